"""One attempt: it falls silent once a newer one has begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from harness import journal
from harness.attempt import Attempt
from harness.checkpoint import Superseded
from harness.correct import correct, write
from harness.data.index import CorruptSample
from harness.data.loader import SUBSTITUTED_SHARE, Substitution
from harness.dist import Ranks
from harness.engine import Engine
from harness.store import TrialFolder
from tests.trials import trial

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def _fail(attempt: Attempt) -> None:
    raise ValueError("late")


@pytest.mark.parametrize(
    "last_word",
    [
        lambda a: a.end("finished", 5, "abc"),
        lambda a: a.end("diverged", 5, None, "train/loss is nan"),
        lambda a: a.stop(5, "SIGTERM"),
        _fail,
    ],
    ids=["finished", "diverged", "stop", "failed"],
)
def test_the_last_word_of_a_superseded_attempt_is_not_heard(tmp_path: Path, last_word: Callable[[Attempt], object]) -> None:
    folder = TrialFolder(tmp_path)
    with pytest.raises((Superseded, ValueError)), Attempt(trial(), folder, ALONE) as attempt:
        attempt.log(4, {"train/loss": 1.0})
        folder.claim()
        partial = folder.checkpoints / ".step-9-attempt-2"
        partial.mkdir(parents=True)
        last_word(attempt)
    assert [line for line in journal.read(folder.journal) if "event" in line] == []
    assert not folder.result.exists()
    assert partial.exists(), "it tidies nothing away either"
    assert not folder.is_running()


def test_a_superseded_attempt_leaves_the_bits_of_images_as_they_are(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    newer = np.array([True, False, True])
    with pytest.raises(Superseded), Attempt(trial(), folder, ALONE) as attempt:
        attempt.keep_correct(4, "val", ~newer)
        assert (correct(folder, "val") == ~newer).all()
        folder.claim()
        write(folder, "val", 4, newer)
        attempt.keep_correct(4, "val", ~newer)
    assert (correct(folder, "val") == newer).all()


class _Contested(TrialFolder):
    """Where somebody else claims at the same moment."""

    def claim(self) -> int:
        number = super().claim()
        super().claim()
        return number


def test_of_two_attempts_that_take_over_at_once_one_does_not_begin(tmp_path: Path) -> None:
    folder = _Contested(tmp_path)
    folder.result.write_text("{}")
    earlier = Attempt(trial(), folder, ALONE, takes_over=True)
    with pytest.raises(Superseded, match="attempt 1 stops at step 0"), earlier:
        pass
    assert folder.result.exists()
    assert not folder.journal.exists()
    assert not folder.is_running(), "nor does it keep the other one waiting"


def test_what_is_unfinished_goes_when_the_trial_ends(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    with Attempt(trial(), folder, ALONE) as attempt:
        for number in (1, 2):
            (folder.checkpoints / f".step-9-attempt-{number}").mkdir(parents=True)
        assert attempt.end("finished", 245, "abc")["state"] == "finished"
    assert [p.name for p in folder.checkpoints.iterdir()] == [".step-9-attempt-2"], "a newer attempt's may be being written"


class _Two(Ranks):
    """Rank 0 of two, whose peer has found other samples."""

    def gathered(self, value: list[object]) -> list[object]:
        return [value, [(number + 1, message) for number, message in value]]  # type: ignore[misc]


def test_substituted_samples_are_counted_over_ranks_and_attempts(tmp_path: Path) -> None:
    folder, engine = TrialFolder(tmp_path), cast(Engine, None)  # with no checkpoint nothing is loaded
    limit = int(trial().workload.data.trained_samples * SUBSTITUTED_SHARE)
    found = [Substitution(number, 1, "corrupt") for number in range(10, 10 + limit)]
    with Attempt(trial(), folder, ALONE) as attempt:
        attempt.resume(engine)
        assert attempt.substitutions(0, []) == {}
        assert attempt.substitutions(4, found[:-1]) == {"data/substituted": limit - 1}
    with Attempt(trial(), folder, ALONE) as attempt:
        attempt.resume(engine)
        assert attempt.substitutions(4, []) == {"data/substituted": limit - 1}, "it does not fall"
        assert attempt.substitutions(4, found) == {"data/substituted": limit}
    assert len(journal.fold(journal.read(folder.journal)).warnings) == limit, "each is warned of once"
    with pytest.raises(CorruptSample, match=f"{limit + 1} of 3500"), Attempt(trial(), folder, _Two(0, 0, 2, ALONE.device)) as attempt:
        attempt.resume(engine)
        attempt.substitutions(4, found)
