"""What stands in configs/: every workload and study loads, is planned and dry-run; the ImageNet studies ask what they say they ask."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from harness import config, schedule, study
from harness.config import WorkloadFile, read_cluster
from harness.study import planned
from launch import array, plan, scaling
from tests.unit.conftest import Command

WORKLOADS = sorted(Path("configs/workload").glob("*.yaml"))
STUDIES = sorted(Path("configs/study").glob("*.yaml"))
EIGHT = {
    f"{name}{'W' if decay == 'decoupled' else ''}{'R' if course == 'cosine_restarts' else ''}": (name.lower(), decay, course)
    for name, decay, course in itertools.product(("Adam", "SGD"), ("l2", "decoupled"), ("cosine", "cosine_restarts"))
}


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.mark.parametrize("path", WORKLOADS, ids=names(WORKLOADS))
def test_a_workload_states_its_reference(path: Path) -> None:
    workload = WorkloadFile.model_validate(yaml.safe_load(path.read_text()))
    assert workload.name == path.stem
    if not workload.name.startswith("mnist5k"):
        assert workload.reference is not None


@pytest.mark.parametrize("path", STUDIES, ids=names(STUDIES))
def test_a_study_can_be_run(path: Path) -> None:
    loaded = study.load(path)
    assert loaded.name == path.stem
    assert not [line for line in study.warnings(loaded) if "cuts cycle" in line]
    array.check_ranks(loaded, read_cluster("slurm"))
    if loaded.study.sampler.name == "grid":
        for arm in loaded.study.arms.values():
            values = [value for point in study.points("any", arm, loaded.study) for value in point.values()]
            assert min(values) > 0, "a map has logarithmic axes"


def test_a_price_is_images_by_speed() -> None:
    loaded = study.load("configs/study/imagenet_adamwr_vs_sgdwr.yaml")
    images = 90 * 1202 * 1024  # epochs, floor((1,281,167 - 50,000) / 1024) steps each, images a step
    assert plan.referred_gpu_hours(loaded) == pytest.approx(images / 2500 / 3600)


FFCV = [
    "workload.data={image_size: 192, resize: 293, eval_image_size: 256}", "workload.recipe.resolution={start: 160, epochs: [65, 76]}",
]  # fmt: skip


def test_a_schedule_of_resolutions_is_priced_by_pixels() -> None:
    """FFCV's, of 90 epochs: 71 at 160 pixels, 19 at 192."""
    plain, grown = (study.load("configs/study/imagenet_adamwr_vs_sgdwr.yaml", over) for over in (["workload.data.image_size=192"], FFCV))
    hours, fewer = plan.referred_gpu_hours(plain), plan.referred_gpu_hours(grown)
    assert hours is not None and fewer is not None
    share = (71 * 160**2 + 19 * 192**2) / (90 * 192**2)
    assert fewer / hours == pytest.approx(share)
    read = [plan.scale(loaded, planned(loaded, {}), read_cluster("slurm"))["images_a_second"] for loaded in (plain, grown)]
    assert read[0] / read[1] == pytest.approx(share)


def test_a_schedule_of_resolutions_beside_restarts_is_told() -> None:
    path = Path("configs/study/imagenet_adamwr_vs_sgdwr.yaml")
    told = [line for line in study.warnings(study.load(path, FFCV)) if line.startswith("workload.recipe.resolution")]
    restarted = "SGDR, SGDWR, AdamR, AdamWR, AdamWR-defaults, AdamWR-eps, AdamWR-reset"
    assert told == [f"workload.recipe.resolution: blurs what the restarts of {restarted} do; leave it out of a comparison"]
    assert any("data.eval_image_size: 256 instead of null" in line for line in study.warnings(study.load(path, FFCV))), "a departure too"
    assert not [line for line in study.warnings(study.load(path)) if "resolution" in line]
    single = study.load("configs/study/paper_figure2.yaml", [
        "workload={name: imagenet_resnet50}", "workload.recipe.resolution={start: 192, epochs: [0, 1]}", "ranks=null",
    ])  # fmt: skip
    assert not [line for line in study.warnings(single) if "blurs" in line], "no restarts, nothing to blur"


def test_a_plan_states_the_arm_that_takes_most() -> None:
    """SGD, the first arm, keeps one moment; Adam keeps two and logs adam/v_below_eps at its cycle ends."""
    loaded = study.load("configs/study/imagenet_adamwr_vs_sgdwr.yaml")
    found = plan.scale(loaded, planned(loaded, {}), read_cluster("slurm"))
    assert found["bytes_a_rank"] == 16 * 25_557_032, "fp32 weights, gradients and two moments, not sharded"
    assert found["bytes_sent_a_step"] > found["bytes_exposed_a_step"] == 0, "DDP sends nothing after its backward pass"
    assert found["checkpoint_bytes"] == 12 * 25_557_032
    trials = {p.arm: p.trial for p in planned(loaded, {}) if p.trial is not None}
    assert found["points_a_trial"] == scaling.points(trials["AdamWR"]) > scaling.points(trials["SGD"])


def test_ranks_that_do_not_fit_are_told_before_anything_is_submitted(wrbench: Command, tmp_path: Path) -> None:
    one = ["paper_figure1", "--cluster", "slurm", "--store", tmp_path, "--set", "ranks=null"]  # as the cluster says: eight
    code, _, err = wrbench("study", "plan", *one)
    assert code == 0
    assert "norm_batch_size: 64 does not divide the micro-batch of 16" in err
    code, _, err = wrbench("study", "submit", *one, "--dry-run")
    assert code == 2
    assert "norm_batch_size: 64 does not divide the micro-batch of 16" in err


@pytest.mark.parametrize("name", ["paper_figure1", "imagenet_adamwr_vs_sgdwr", "mnist5k_maps"])
def test_one_of_each_kind_is_planned_and_dry_run(name: str, wrbench: Command, tmp_path: Path) -> None:
    path = Path(f"configs/study/{name}.yaml")
    code, out, err = wrbench("study", "plan", path, "--store", tmp_path)
    assert code == 0, err
    if not name.startswith("mnist5k"):
        assert "GPU-hours of training: " in out
        assert " of an A100 at " in out
    code, out, err = wrbench("study", "submit", path, "--cluster", "slurm", "--dry-run", "--store", tmp_path)
    assert code == 0, err
    assert "#SBATCH --array" in out
    assert not list(tmp_path.iterdir()), "nothing is written"


QUESTIONS = [p for p in STUDIES if p.stem.startswith("imagenet") and not p.stem.endswith("_boxes")]


@pytest.mark.parametrize("path", QUESTIONS, ids=names(QUESTIONS))
def test_restarts_and_decoupling_are_not_confounded(path: Path) -> None:
    loaded = study.load(path)
    trials = {p.arm: p.trial for p in reversed(planned(loaded, {})) if p.trial is not None}
    assert {name: (t.optimizer.name, t.decay.name, t.schedule.name) for name, t in trials.items() if name in EIGHT} == EIGHT
    assert set(trials) - set(EIGHT) == {"AdamWR-defaults", "AdamWR-eps", "AdamWR-reset"}
    ends = [6, 18] if "18" in path.stem else [6, 18, 42, 90]
    per_epoch = schedule.steps_per_epoch(trials["SGDWR"])
    assert schedule.cycle_ends(trials["SGDWR"]) == [end * per_epoch for end in ends]
    defaults = trials["AdamWR-defaults"].optimizer
    assert (defaults.eps, defaults.betas) == (1e-8, (0.9, 0.999))
    assert [name for name, t in trials.items() if getattr(t.schedule, "reset_moments", False)] == ["AdamWR-reset"]
    paper = path.stem.endswith("_paper")
    for t in trials.values():
        assert t.decay.exempt_1d is not paper
        assert (t.schedule.warmup_epochs == 0) is paper
        assert t.workload.recipe.label_smoothing == (0 if paper or "vit" in path.stem else 0.1)
    points = {name: len([p for p in planned(loaded, {}) if p.arm == name and p.phase == "search"]) for name in trials}
    assert len(set(points.values())) == 1, "equal budgets"


BOXED = [p for p in STUDIES if "boxes:" in p.read_text()]


@pytest.mark.parametrize("path", BOXED, ids=names(BOXED))
def test_a_broad_box_holds_the_narrow_one(path: Path) -> None:
    loaded = study.load(path)
    plain = {name: arm for name, arm in loaded.study.arms.items() if name.endswith(".narrow")}
    assert len(plain) == 3
    for name, narrow in plain.items():
        broad = loaded.study.arms[name.replace(".narrow", ".broad")]
        assert narrow.space.keys() == broad.space.keys()
        for key, axis in narrow.space.items():
            (low, high), (lowest, highest) = axis.log_uniform, broad.space[key].log_uniform
            assert lowest <= low and high <= highest and (lowest, highest) != (low, high), key


def test_the_boxes_of_18_epochs_are_about_those_of_the_study_without() -> None:
    plain, boxed = (study.load(f"configs/study/imagenet_18_epochs{name}.yaml") for name in ("", "_boxes"))
    for name in ("AdamWR", "AdamWR-eps", "SGDWR"):
        assert boxed.study.arms[f"{name}.narrow"].space == plain.study.arms[name].space
    assert boxed.workload == plain.workload


def test_a_departure_from_the_reference_is_told() -> None:
    path = Path("configs/study/imagenet_18_epochs_paper.yaml")
    told = [line for line in study.warnings(study.load(path)) if "departs from its reference" in line]
    assert len(told) == 1
    for what in (
        "data.image_size: 128 instead of 224",
        "recipe.label_smoothing: 0.0 instead of 0.1",
        "budget.epochs: 18.0 instead of 112.0",
    ):
        assert what in told[0]


@pytest.mark.parametrize(
    ("name", "departs"),
    [  # nothing but what the published numbers had otherwise
        ("imagenet_adamwr_vs_sgdwr", "budget.epochs: 90.0 instead of 112.0, images trained on: 1231167 instead of 1281167"),
        (
            "imagenet_vit_s16_adamwr_vs_sgdwr",
            "images trained on: 1231167 instead of 1268355, schedule.warmup_epochs: 2.0 instead of 8.0",
        ),
        ("paper_figure1", "budget.epochs: 100.0 instead of 1800.0, images trained on: 45000 instead of 50000"),
        ("paper_figure3", "images trained on: 45000 instead of 50000"),
        ("paper_figure4_imagenet32", "images trained on: 1231167 instead of 1281167"),
        ("reference_imagenet_vit_s16", "images trained on: 1268167 instead of 1268355"),  # the same share of each class
        ("reference_imagenet_resnet50", None),
        ("reference_imagenet_regnety_1_6gf", None),
        ("reference_imagenet32_wrn28_10", None),
        ("reference_cifar10_wrn28_10", None),
    ],
)
def test_a_departure_from_the_published_number_is_told(name: str, departs: str | None) -> None:
    told = [line for line in study.warnings(study.load(f"configs/study/{name}.yaml")) if "departs from its reference" in line]
    assert len(told) == (departs is not None)
    assert all(line.endswith(f": {departs}") for line in told)


def test_a_stored_study_tells_the_same_departures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it departed from is no longer at hand there."""
    loaded = study.load("configs/study/imagenet_18_epochs_paper.yaml")
    (tmp_path / "study.yaml").write_text(loaded.text())
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "nowhere")
    again = study.load(tmp_path / "study.yaml")
    assert again.workload.reference == loaded.workload.reference
    assert loaded.workload.reference is not None and len(loaded.workload.reference.departures) == 5


def test_a_departure_that_was_stored_is_told_as_it_is_now(tmp_path: Path) -> None:
    """Not twice, and not of what is again as it was."""
    source = "configs/study/imagenet_18_epochs_paper.yaml"
    (tmp_path / "study.yaml").write_text(study.load(source).text())

    def departures(path: str | Path, *overrides: str) -> set[str]:
        reference = study.load(path, overrides).workload.reference
        assert reference is not None
        return set(reference.departures)

    for overrides in (
        (),
        ("budget.epochs=112",),
        ("budget.epochs=30", "workload.data.image_size=144"),
        ("workload.data.image_size=224", "workload.data.resize=256", "workload.recipe.label_smoothing=0.1"),
        ("workload.recipe.flip=false",),  # as it was in the file
        ("arms.AdamWR.schedule.warmup_epochs=1",),
    ):
        assert departures(tmp_path / "study.yaml", *overrides) == departures(source, *overrides), overrides
    assert "budget.epochs" not in str(departures(tmp_path / "study.yaml", "budget.epochs=112"))


def test_a_warmup_that_was_stored_is_told_as_it_is_now(tmp_path: Path) -> None:
    loaded = study.load("configs/study/reference_imagenet_resnet50.yaml", ["arms.SGD.schedule.warmup_epochs=2"])
    (tmp_path / "study.yaml").write_text(loaded.text())
    for warmup, departures in ((2, ("schedule.warmup_epochs: 2.0 instead of 0.0",)), (0, ())):
        again = study.load(tmp_path / "study.yaml", [f"arms.SGD.schedule.warmup_epochs={warmup}"])
        assert again.workload.reference is not None and again.workload.reference.departures == departures


def told_of_reference(*overrides: str) -> str:
    warnings = study.warnings(study.load("configs/study/reference_imagenet_resnet50.yaml", overrides))
    return "".join(line.partition("batches of 256): ")[2] for line in warnings if "departs" in line)


def test_a_recipe_of_another_source_departs_from_its_own_number_alone() -> None:
    """It is not that of the workload file; but its budget is what the number was published for, or that is told."""
    assert told_of_reference() == ""
    assert told_of_reference("budget.epochs=30") == "budget.epochs: 30.0 instead of 90.0"


def test_what_is_set_beside_a_recipe_of_another_source_departs_from_it() -> None:
    """The file is the recipe; what the command line changes of it is not."""
    changed = ("workload.recipe.label_smoothing=0.3", "workload.model.name=resnet18", "budget.global_batch_size=512")
    assert told_of_reference(*changed) == (
        "model.name: resnet18 instead of resnet50, recipe.label_smoothing: 0.3 instead of 0.0, budget.global_batch_size: 512 instead of 256"
    )


def test_a_number_and_its_source_are_stated_together() -> None:
    for one in ("source=somebody", "top1_error=30"):
        with pytest.raises(config.BadInput, match="source and top1_error are of one publication"):
            study.load("configs/study/imagenet_18_epochs.yaml", [f"workload.reference.{one}"])


def test_the_price_of_another_network_is_told() -> None:
    def told(*changes: str) -> list[str]:
        loaded = study.load("configs/study/imagenet_18_epochs.yaml", ["workload.model.name=resnet18", *changes])
        return [line for line in study.warnings(loaded) if line.startswith("workload.model: resnet18 instead of resnet50_zero_init")]

    assert len(told()) == 1
    assert told("workload.reference.parameters=11689512") == [], "its speed is the study's own"


def test_a_workload_file_that_leaves_out_its_name_takes_another_network(tmp_path: Path) -> None:
    file = yaml.safe_load(Path("configs/workload/imagenet_resnet50.yaml").read_text())
    del file["name"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(file))
    changes = [f"workload.name={tmp_path / 'mine.yaml'}", "workload.model.name=resnet18"]
    lines = study.warnings(study.load("configs/study/imagenet_18_epochs.yaml", changes))
    assert any(line.startswith("workload.model: resnet18 instead of resnet50_zero_init") for line in lines)


@pytest.mark.parametrize("path", [p for p in WORKLOADS if p.stem.startswith(("cifar10", "imagenet32"))], ids=lambda p: p.stem)
def test_a_shifted_image_has_a_border_that_is_0_to_the_network(path: Path) -> None:
    """As in the released code, which normalises and then pads with zeros; to within half a level."""
    workload = WorkloadFile.model_validate(yaml.safe_load(path.read_text()))
    assert workload.recipe.translate == 4 and workload.recipe.border is not None
    assert workload.recipe.border == tuple(round(255 * mean) for mean in workload.data.mean)


def test_a_study_of_another_image_size_is_priced_by_its_pixels_unless_it_states_a_speed() -> None:
    def speed(*changes: str) -> float:
        reference = study.load("configs/study/imagenet_adamwr_vs_sgdwr.yaml", changes).workload.reference
        assert reference is not None
        return reference.images_per_second

    smaller = "workload.data.image_size=112"
    assert speed(smaller) == 4 * speed() == 10_000
    for stated in (7000, 2500):  # 2,500 is the file's
        assert speed(smaller, f"workload.reference.images_per_second={stated}") == stated
