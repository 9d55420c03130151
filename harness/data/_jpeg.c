/* JPEG bytes -> the pixels of one box, by libjpeg-turbo: what lies outside the box is neither transformed nor converted.

   Upsampling at the edge of what is decoded would see other neighbours than in the whole image, so MARGIN pixels more are
   decoded on every side and dropped; with them the box is bit-equal to the full decode. Fancy upsampling stays on:
   jpeg_crop_scanline corrupts memory without it (libjpeg-turbo issue 574). A warning of libjpeg is an error here, since after
   one the pixels are invented. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>
#include <jerror.h>

#ifndef LIBJPEG_TURBO_VERSION_NUMBER
#error "jpeg_crop_scanline is libjpeg-turbo's"
#endif

#include "_huffman.h"

#define MARGIN 16

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf leave;
    char message[JMSG_LENGTH_MAX];
} Errors;

static void fail(j_common_ptr common)
{
    Errors *errors = (Errors *)common->err;
    errors->base.format_message(common, errors->message);
    longjmp(errors->leave, 1);
}

static void message(j_common_ptr common, int level)
{
    if (level < 0)
        fail(common);
}

static void open_errors(Errors *errors, struct jpeg_decompress_struct *jpeg)
{
    jpeg->err = jpeg_std_error(&errors->base);
    errors->base.error_exit = fail;
    errors->base.emit_message = message;
}

static PyObject *header(PyObject *module, PyObject *content)
{
    Py_buffer bytes;
    if (PyObject_GetBuffer(content, &bytes, PyBUF_SIMPLE))
        return NULL;
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    PyObject *result = NULL;
    memset(&jpeg, 0, sizeof jpeg); /* destroyed even where creating it fails */
    open_errors(&errors, &jpeg);
    if (setjmp(errors.leave)) {
        PyErr_SetString(PyExc_ValueError, errors.message);
    } else {
        jpeg_create_decompress(&jpeg);
        jpeg_mem_src(&jpeg, bytes.buf, bytes.len);
        jpeg_read_header(&jpeg, TRUE);
        result = Py_BuildValue("iii", (int)jpeg.image_height, (int)jpeg.image_width, jpeg.num_components);
    }
    jpeg_destroy_decompress(&jpeg);
    PyBuffer_Release(&bytes);
    return result;
}

typedef struct {
    JDIMENSION left, top, width, height;
} Box;

/* 0, or 1 with errors->message. `row` is freed by the caller, also after a longjmp: hence its address. */
static int decode_box(const Py_buffer *bytes, unsigned char *out, int channels, Box box, Errors *errors, unsigned char *volatile *row)
{
    struct jpeg_decompress_struct jpeg;
    static _Thread_local Scan scan; /* zeros at first; its tables stay */
    memset(&jpeg, 0, sizeof jpeg);
    open_errors(errors, &jpeg);
    if (setjmp(errors->leave)) {
        jpeg_destroy_decompress(&jpeg);
        return 1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, bytes->buf, bytes->len);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg.dct_method = JDCT_ISLOW;
    jpeg.do_fancy_upsampling = TRUE;
    jpeg_start_decompress(&jpeg);
    if (box.left + (size_t)box.width > jpeg.output_width || box.top + (size_t)box.height > jpeg.output_height) {
        snprintf(errors->message, sizeof errors->message, "the box does not lie in the image of %ux%u", jpeg.output_height, jpeg.output_width);
        jpeg_destroy_decompress(&jpeg);
        return 1;
    }

    JDIMENSION first = box.left > MARGIN ? box.left - MARGIN : 0;
    JDIMENSION end = box.left + box.width + MARGIN;
    if (end > jpeg.output_width)
        end = jpeg.output_width;
    JDIMENSION columns = end - first;
    if (columns < jpeg.output_width)
        jpeg_crop_scanline(&jpeg, &first, &columns); /* widens both to whole blocks */
    int ours = take_over(&jpeg, &scan, first, columns);
    *row = malloc((size_t)jpeg.output_width * channels + 1);
    if (*row == NULL)
        ERREXIT1(&jpeg, JERR_OUT_OF_MEMORY, 0);
    if (box.top > MARGIN)
        jpeg_skip_scanlines(&jpeg, box.top - MARGIN);
    JSAMPROW rows[1] = {*row + 1}; /* where it is aligned libjpeg-turbo writes past the caches, and reading it back takes longer */
    while (jpeg.output_scanline < box.top + box.height) {
        JDIMENSION at = jpeg.output_scanline;
        jpeg_read_scanlines(&jpeg, rows, 1);
        if (at >= box.top)
            memcpy(out + (size_t)(at - box.top) * box.width * channels, rows[0] + (size_t)(box.left - first) * channels,
                   (size_t)box.width * channels);
    }
    if (jpeg.output_scanline == jpeg.output_height) {
        if (ours)
            hand_back(&jpeg, &scan);
        jpeg_finish_decompress(&jpeg); /* a missing end is a fault of a whole image only */
    }
    jpeg_destroy_decompress(&jpeg);
    return 0;
}

static PyObject *decode(PyObject *module, PyObject *arguments)
{
    Py_buffer bytes, out;
    int channels, left, top, width, height;
    if (!PyArg_ParseTuple(arguments, "y*w*i(iiii)", &bytes, &out, &channels, &left, &top, &width, &height))
        return NULL;
    PyObject *result = NULL;
    if ((channels != 1 && channels != 3) || left < 0 || top < 0 || width < 1 || height < 1) {
        PyErr_SetString(PyExc_ValueError, "1 or 3 channels of a box (left, top, width, height) that is not empty");
    } else if ((size_t)out.len != (size_t)width * height * channels) {
        PyErr_Format(PyExc_ValueError, "the buffer has %zd bytes, the box %zu", out.len, (size_t)width * height * channels);
    } else {
        Box box = {left, top, width, height};
        Errors errors;
        unsigned char *volatile row = NULL;
        int failed;
        Py_BEGIN_ALLOW_THREADS
        failed = decode_box(&bytes, out.buf, channels, box, &errors, &row);
        free(row);
        Py_END_ALLOW_THREADS
        if (failed)
            PyErr_SetString(PyExc_ValueError, errors.message);
        else
            result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&bytes);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"header", header, METH_O, "header(content) -> (height, width, components); ValueError with libjpeg's message."},
    {"decode", decode, METH_VARARGS,
     "decode(content, out, channels, (left, top, width, height)): grey (1) or RGB (3) pixels of the box, row by row, into the\n"
     "writable buffer `out` of exactly height * width * channels bytes, without the interpreter lock. ValueError with libjpeg's\n"
     "message, its warnings included; `out` is then partly written."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_jpeg", "The box of a JPEG.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void)
{
    return PyModuleDef_Init(&definition);
}
