/* Huffman decoding of a photograph's coefficients in the place of libjpeg-turbo's own, which takes most of the time of a JPEG.

   The stuffing is removed beforehand, a code and the bits of its value are looked up together, and of blocks beside the columns
   wanted only the lengths are. The coefficients are libjpeg's, bit for bit, and what it warns of is an error here.
   For a baseline JPEG of one scan without restart markers, which nearly all are; others are left to libjpeg. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LOOK 11
#define PADDING 16
#define SPARE 7 /* bytes before the end marker that libjpeg does not notice, since it reads ahead */
#define INLINE static inline __attribute__((always_inline))

/* How struct jpeg_entropy_decoder begins (jpegint.h, which is not installed) in every libjpeg-turbo. */
typedef struct {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
} Entropy;

typedef struct {
    const JOCTET *at, *end; /* the rest of the data, PADDING bytes of 0 behind it */
    uint64_t bits;          /* the next `count`, at the top */
    int count;
} Bits;

typedef struct {
    /* By the next LOOK bits: value << 16 | places << 8 | bits, of a coefficient with the zeros before it. If they do not hold its
       value: symbol << 16 | length of its code << 8. Nor its code: 0. */
    int32_t one[1 << LOOK];
    /* places << 8 | bits, of as many coefficients as they hold, the end of a block counted as 64. */
    uint16_t several[1 << LOOK];
    uint32_t end[17];   /* of the codes of up to n bits, at the top of 16 */
    int32_t offset[17]; /* from a code of n bits to its symbol's place */
    UINT8 lengths[17], symbols[256]; /* what it is made from, as in JHUFF_TBL */
} Table;

typedef struct {
    Bits bits;
    const JOCTET *marker, *source_end;
    JDIMENSION column, first, last; /* of MCUs: the next one's, and those that are wanted */
    struct {
        const Table *dc, *ac;
        unsigned *last_dc;
    } block[D_MAX_BLOCKS_IN_MCU];
    unsigned last_dc[MAX_COMPS_IN_SCAN];
    Table dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
} Scan;

/* Zigzag; damaged data may go on to 15 places behind a block's end, and libjpeg puts those in its last one. */
static const uint8_t ORDER[64 + 64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
};

/* The number that `size` > 0 bits stand for (ITU-T T.81, F.2.2.1). */
INLINE int extended(unsigned bits, int size)
{
    return bits >> (size - 1) ? (int)bits : (int)bits + 1 - (1 << size);
}

/* That a symbol of an AC table goes on by; 64: to the end of the block. */
INLINE int places_of(int symbol)
{
    return symbol & 15 ? (symbol >> 4) + 1 : symbol == 0xF0 ? 16 : 64;
}

/* Most photographs have the same tables: what is left of the last one often need not be made again. */
static void fill_table(Table *table, const JHUFF_TBL *huffman, int is_dc)
{
    if (!memcmp(table->lengths, huffman->bits, sizeof table->lengths) && !memcmp(table->symbols, huffman->huffval, sizeof table->symbols))
        return;
    memcpy(table->lengths, huffman->bits, sizeof table->lengths);
    memcpy(table->symbols, huffman->huffval, sizeof table->symbols);
    memset(table->one, 0, sizeof table->one);
    uint32_t code = 0;
    int number = 0;
    for (int length = 1; length <= 16; length++) {
        table->offset[length] = number - (int32_t)code;
        for (int i = 0; i < huffman->bits[length]; i++, number++, code++) {
            int symbol = huffman->huffval[number], size = symbol & 15, spare = LOOK - length;
            for (uint32_t rest = 0; spare >= 0 && rest < 1u << spare; rest++) {
                int value = size && size <= spare ? extended(rest >> (spare - size), size) : 0;
                table->one[code << spare | rest] =
                    size > spare ? symbol << 16 | length << 8
                                 : (int32_t)((uint32_t)value << 16) | (is_dc ? 1 : places_of(symbol)) << 8 | (length + size);
            }
        }
        table->end[length] = code << (16 - length);
        code <<= 1;
    }
    for (uint32_t index = 0; index < 1 << LOOK && !is_dc; index++) {
        int bits = 0, places = 0;
        while (places < 64) {
            int32_t found = table->one[index << bits & ((1 << LOOK) - 1)];
            int more = found >> 8 & 255;
            if (!(found & 255) || bits + (found & 255) > LOOK || (more < 64 && places + more >= 64))
                break;
            bits += found & 255;
            places += more;
        }
        table->several[index] = (uint16_t)(places << 8 | bits);
    }
}

INLINE void refill(Bits *from, j_decompress_ptr jpeg)
{
    uint64_t next;
    if (from->at > from->end + PADDING - 8) /* all are taken, and more */
        ERREXIT(jpeg, JWRN_HIT_MARKER);
    memcpy(&next, from->at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    next = __builtin_bswap64(next);
#endif
    from->bits |= next >> from->count;
    from->at += (63 - from->count) >> 3;
    from->count |= 56;
}

INLINE unsigned take(Bits *from, int count)
{
    unsigned bits = (unsigned)(from->bits >> (64 - count));
    from->bits <<= count;
    from->count -= count;
    return bits;
}

/* The next symbol, of which `found` is in the table's `one`. */
INLINE int symbol_of(Bits *from, const Table *table, int32_t found, j_decompress_ptr jpeg)
{
    if (found) {
        take(from, found >> 8 & 255);
        return found >> 16;
    }
    uint32_t next = (uint32_t)(from->bits >> 48);
    int length = LOOK + 1;
    while (length <= 16 && next >= table->end[length])
        length++;
    if (length > 16)
        ERREXIT(jpeg, JWRN_HUFF_BAD_CODE);
    return table->symbols[table->offset[length] + (int)take(from, length)];
}

/* The next coefficient of a block, into `block` or nowhere; the place after it. Takes LOOK bits at most, or fills up. */
INLINE int coefficient(Bits *from, const Table *table, int place, JCOEF *block, j_decompress_ptr jpeg)
{
    uint32_t index = (uint32_t)(from->bits >> (64 - LOOK));
    if (!block) {
        int several = table->several[index], places = several >> 8;
        if (places && place + (places & 63) + (places >> 6) <= 64) {
            take(from, several & 255);
            return place + places;
        }
    }
    int32_t found = table->one[index];
    int value = found >> 16;
    if (__builtin_expect(found & 255, 1)) {
        take(from, found & 255);
        place += found >> 8 & 255;
    } else {
        refill(from, jpeg);
        int symbol = symbol_of(from, table, found, jpeg), size = symbol & 15;
        place += places_of(symbol);
        value = size ? extended(take(from, size), size) : 0;
        refill(from, jpeg);
    }
    if (block)
        block[ORDER[place - 1]] = (JCOEF)value; /* for a run or the end of a block a 0, where nothing is yet */
    return place;
}

/* A block into `block`, which is 0, or nowhere. */
INLINE void decode_block(Bits *from, const Table *dc, const Table *ac, unsigned *last_dc, JCOEF *block, j_decompress_ptr jpeg)
{
    refill(from, jpeg);
    int32_t found = dc->one[from->bits >> (64 - LOOK)];
    if (found & 255) {
        take(from, found & 255);
        *last_dc += (unsigned)(found >> 16);
    } else {
        int size = symbol_of(from, dc, found, jpeg);
        if (size)
            *last_dc += (unsigned)extended(take(from, size), size);
    }
    if (block)
        block[0] = (JCOEF)*last_dc;
    for (int place = 1; place < 64;) {
        refill(from, jpeg); /* 56 bits, enough for five */
        for (int i = 0; i < 5 && place < 64; i++)
            place = coefficient(from, ac, place, block, jpeg);
    }
}

static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *blocks)
{
    Scan *scan = (Scan *)jpeg->client_data;
    Bits from = scan->bits;
    int wanted = blocks != NULL && scan->column >= scan->first && scan->column <= scan->last;
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        if (wanted)
            decode_block(&from, scan->block[i].dc, scan->block[i].ac, scan->block[i].last_dc, *blocks[i], jpeg);
        else
            decode_block(&from, scan->block[i].dc, scan->block[i].ac, scan->block[i].last_dc, NULL, jpeg);
    }
    if ((from.at - from.end) * 8 > from.count)
        ERREXIT(jpeg, JWRN_HIT_MARKER);
    scan->bits = from;
    scan->column = scan->column + 1 < jpeg->MCUs_per_row ? scan->column + 1 : 0;
    return TRUE;
}

/* The data up to a marker, without stuffing, in `scan`. */
static void unstuff(j_decompress_ptr jpeg, Scan *scan)
{
    const JOCTET *from = jpeg->src->next_input_byte, *end = from + jpeg->src->bytes_in_buffer;
    JOCTET *to = jpeg->mem->alloc_large((j_common_ptr)jpeg, JPOOL_IMAGE, (size_t)(end - from) + PADDING);
    scan->bits = (Bits){.at = to};
    scan->source_end = end;
    for (;;) {
        const JOCTET *marker = memchr(from, 0xFF, (size_t)(end - from));
        size_t plain = (size_t)((marker ? marker : end) - from);
        memcpy(to, from, plain);
        to += plain;
        scan->marker = marker ? marker : end;
        for (from = scan->marker; from < end && *from == 0xFF; from++)
            ; /* any number of them is one */
        if (from == end || *from++ != 0)
            break;
        *to++ = 0xFF;
    }
    memset(to, 0, PADDING);
    scan->bits.end = to;
}

/* After jpeg_start_decompress and jpeg_crop_scanline: whether `scan` decodes from here on, of which `columns` pixels from `left`
   are wanted. */
static int take_over(j_decompress_ptr jpeg, Scan *scan, JDIMENSION left, JDIMENSION columns)
{
    if (jpeg->progressive_mode || jpeg->arith_code || jpeg->restart_interval || jpeg->comps_in_scan != jpeg->num_components ||
        jpeg->data_precision != 8 || jpeg->Se != DCTSIZE2 - 1) /* lossless ones, of libjpeg-turbo 3, have no blocks */
        return 0;
    for (int i = 0; i < jpeg->comps_in_scan; i++) {
        const jpeg_component_info *component = jpeg->cur_comp_info[i];
        fill_table(&scan->dc[component->dc_tbl_no], jpeg->dc_huff_tbl_ptrs[component->dc_tbl_no], 1);
        fill_table(&scan->ac[component->ac_tbl_no], jpeg->ac_huff_tbl_ptrs[component->ac_tbl_no], 0);
    }
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        int number = jpeg->MCU_membership[i];
        scan->block[i].dc = &scan->dc[jpeg->cur_comp_info[number]->dc_tbl_no];
        scan->block[i].ac = &scan->ac[jpeg->cur_comp_info[number]->ac_tbl_no];
        scan->block[i].last_dc = &scan->last_dc[number];
    }
    int alone = jpeg->comps_in_scan == 1; /* an MCU is then one block, whatever the sampling */
    JDIMENSION width = alone ? DCTSIZE : (JDIMENSION)jpeg->max_h_samp_factor * DCTSIZE;
    scan->column = 0;
    scan->first = left / width;
    scan->last = (left + columns - 1) / width;
    if (alone && jpeg->max_h_samp_factor > 1) { /* libjpeg means other columns by the same numbers */
        scan->first = 0;
        scan->last = jpeg->MCUs_per_row;
    }
    memset(scan->last_dc, 0, sizeof scan->last_dc);
    unstuff(jpeg, scan);
    jpeg->client_data = scan;
    ((Entropy *)jpeg->entropy)->decode_mcu = decode_mcu;
    return 1;
}

/* After the last row: libjpeg goes on at the marker. */
static void hand_back(j_decompress_ptr jpeg, Scan *scan)
{
    ptrdiff_t spare = scan->bits.end - scan->bits.at + scan->bits.count / 8;
    if (spare > SPARE)
        ERREXIT2(jpeg, JWRN_EXTRANEOUS_DATA, (int)spare, scan->marker + 1 < scan->source_end ? scan->marker[1] : 0);
    jpeg->src->next_input_byte = scan->marker;
    jpeg->src->bytes_in_buffer = (size_t)(scan->source_end - scan->marker);
}
