"""A teacher with a memory teaches as one without, whatever happens to the process, and refuses another's memory."""

import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from distill import remembering
from distill.remembering import CLASSES, SIZE, TAPS, Teacher, data, forward, roll, train, views
from slivo import losses
from slivo.distill import Views, cached, committee, distill, distillation, fill
from slivo.distill.records import publish, spread, squeeze
from slivo.distill.teacher import checksum
from slivo.distill.views import loader
from slivo.errors import ArtifactError, RecipeError, ShapeError, SlivoError
from slivo.tasks import classification


def weights(result):
    return checksum(result.model)


def full(folder, shown=None, teacher=None, **options):
    """Return a filled cache."""
    cache = cached(teacher or Teacher(), shown or views(), folder, **options)
    fill(cache, forward, batch_size=5)
    return cache


def everything(cache):
    """Return all that a cache holds, by asking it for each view."""
    batch = cache.data.batch(range(len(cache.data) * cache.data.count))
    return cache.outputs(forward, batch, cache._taps)


def records(folder):
    (path,) = folder.glob("*.npy")
    return path


@contextmanager
def largest_file(size):
    """Have writes behind some place of a file fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What it teaches


@pytest.mark.parametrize("count", [1, 2])
def test_a_student_is_the_same_to_the_bit_as_without_a_cache(tmp_path, count):
    plain = train(Teacher(), None, count=count)
    lazy, warm = train(Teacher(), tmp_path, count=count), train(Teacher(), tmp_path, count=count)
    assert weights(lazy) == weights(warm) == weights(plain)
    assert [row["terms"] for row in lazy.history] == [row["terms"] for row in plain.history]
    before = full(tmp_path / "before", views(count), taps=TAPS, feature_dtype=torch.float32)
    assert len(before.missing()) == 0
    assert weights(train(Teacher(), tmp_path / "before", count=count)) == weights(plain)


def test_the_teacher_is_run_once_for_a_view_and_then_hardly_ever(tmp_path):
    teacher, shown = Teacher(), views()
    cache = cached(teacher, shown, tmp_path)
    batches = loader(shown, batch_size=4, seed=0)
    for _ in range(2):
        for batch in batches:
            cache.outputs(forward, batch, [""])
    assert sum(teacher.rows) == 2 * SIZE
    teacher.rows.clear()
    for _ in range(10):
        for batch in batches:
            cache.outputs(forward, batch, [""])
    # 30 batches: at the first, second, fourth, eighth and sixteenth one sample is compared.
    assert teacher.rows == [1] * 5


def test_only_what_is_missing_is_run_where_samples_can_be_taken_out(tmp_path):
    teacher, shown = Teacher(), views()
    cache = cached(teacher, shown, tmp_path / "tensors")
    cache.outputs(forward, shown.batch([1, 3, 5]), [])
    teacher.rows.clear()
    found = cache.outputs(forward, shown.batch([0, 1, 2, 3]), [""])
    assert teacher.rows == [1, 2]  # one to compare
    assert torch.equal(found[""], teacher.eval()(shown.batch([0, 1, 2, 3])[0]))

    def collate(samples):
        return {"image": torch.stack([image for image, _ in samples]), "names": ["a name"] * len(samples)}

    named = Views(data(), collate=collate)
    cache = cached(teacher, named, tmp_path / "names")
    cache.outputs(lambda model, batch: model(batch["image"]), named.batch([1, 3]), [])
    teacher.rows.clear()
    found = cache.outputs(lambda model, batch: model(batch["image"]), named.batch([0, 1, 2]), [""])
    assert teacher.rows == [3, 3]
    assert torch.equal(found[""], teacher(data().tensors[0][:3]))


def test_the_teacher_learns_nothing_while_it_answers(tmp_path):
    teacher = Teacher().train()
    before = checksum(teacher)
    full(tmp_path, teacher=teacher)
    assert checksum(teacher) == before
    assert teacher.training
    assert not any(module._forward_hooks for module in teacher.modules())


def test_what_is_kept_does_not_depend_on_the_precision_of_the_training(tmp_path):
    shown = views()
    cache = cached(Teacher(), shown, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        found = cache.outputs(forward, shown.batch(range(24)), [""])[""]
    assert torch.equal(found, Teacher().eval()(shown.batch(range(24))[0]))


def test_a_committee_is_remembered_as_any_teacher(tmp_path):
    both = committee([Teacher(), Teacher(seed=1)], temperature=2.0)
    cache = full(tmp_path, teacher=both, taps=["", "teachers.*.features"], feature_dtype=torch.float32)
    inputs = cache.data.batch(range(24))[0]
    found = everything(cache)
    torch.testing.assert_close(found[""], both.eval()(inputs))
    assert torch.equal(found["teachers.1.features"], both.teachers[1].features(inputs))


def test_views_train_without_a_cache_and_ordinary_batches_as_ever():
    objective = distillation(Teacher(), forward, None, [losses.kd()], label_weight=0)
    batch = views().batch([3, 4, 17])
    assert torch.equal(objective(remembering.Student().eval(), batch)["kd"], objective(
        remembering.Student().eval(), batch[:2])["kd"])  # fmt: skip


# How it is kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_come_back_as_they_are_in_the_type_they_are_kept_in(tmp_path, dtype):
    cache = full(tmp_path, taps=TAPS, dtype=dtype, feature_dtype=dtype)
    batch = cache.data.batch(range(24))
    teacher = Teacher().double().eval() if dtype == torch.float64 else Teacher().eval()
    features = teacher.features[0](batch[0].to(teacher.head.weight.dtype))
    said = teacher(batch[0].to(teacher.head.weight.dtype))
    again = cached(Teacher(), views(), tmp_path, taps=TAPS, dtype=dtype, feature_dtype=dtype)
    found = everything(again)
    alone = [again.outputs(forward, again.data.batch([index]), TAPS) for index in range(24)]
    assert all(torch.equal(torch.cat([each[path] for each in alone]), found[path]) for path in TAPS)
    assert found[""].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found["features.0"], features.to(dtype).to(found[""].dtype))
    assert torch.equal(found[""], said.float().to(dtype).to(found[""].dtype))


def test_the_file_can_be_read_by_numpy_alone(tmp_path):
    cache = full(tmp_path, taps=["", "features.*"])
    rows = np.load(records(tmp_path), mmap_mode="r")
    assert rows.shape == (24,)
    assert rows.dtype["@features.0"].subdtype == (np.dtype("f2"), (3, 2, 2))
    assert np.array_equal(rows["@"], everything(cache)[""].numpy())
    assert json.loads((tmp_path / "cache.json").read_text())["taps"] == ["", "features.0", "features.1"]


def test_values_beyond_the_type_are_refused(tmp_path):
    teacher = Teacher()
    with torch.no_grad():
        teacher.features[0].bias += 1e5
    with pytest.raises(SlivoError, match=r"'features.0' of the teacher reaches 1e\+05, more than torch.float16"):
        full(tmp_path / "16", teacher=teacher, taps=["features.0"])
    full(tmp_path / "b16", teacher=teacher, taps=["features.0"], feature_dtype=torch.bfloat16)


class Odd(nn.Module):
    """Puts out what cannot be kept: whole numbers, or as much as comes in."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def forward(self, x):
        return x.flatten(1).long() if self.whole else x.flatten(1)


def test_answers_that_cannot_be_kept_are_refused(tmp_path):
    with pytest.raises(SlivoError, match=r"the output of the teacher is of torch.int64; only floats"):
        full(tmp_path / "whole", teacher=Odd(True))
    sizes = [(torch.ones(1, length, length),) for length in (2, 2, 3, 3)]
    with pytest.raises(ShapeError, match=r"shape \(1, 9\) for 1 samples; the cache keeps \(4,\)"):
        fill(cached(Odd(False), Views(sizes), tmp_path / "sizes"), forward, batch_size=1)


# Top k


def distributions(classes, *, sharpness, dtype=torch.float64):
    return sharpness * torch.randn(50, classes, generator=torch.Generator().manual_seed(classes), dtype=dtype)


@pytest.mark.parametrize(("classes", "top_k"), [(5, 1), (5, 4), (100, 1), (100, 10), (1000, 20)])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_top_k_drops_no_mass_and_its_divergence_is_that_of_the_tail_from_equal_parts(classes, top_k, sharpness):
    logits = distributions(classes, sharpness=sharpness)
    exact = logits.log_softmax(-1)
    found = spread(*squeeze(logits, top_k), classes)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(50, dtype=torch.float64))
    top = exact.argsort(descending=True)[:, :top_k]
    torch.testing.assert_close(found.gather(-1, top), exact.gather(-1, top))
    tail = 1 - exact.gather(-1, top).exp().sum(-1)
    divergence = (exact.exp() * (exact - found)).sum(-1)
    # Rounding: sums of a thousand terms, each of a relative error of 1e-16.
    assert (divergence >= -1e-12).all()
    assert (divergence <= tail * math.log(classes - top_k) + 1e-12).all()
    if top_k == classes - 1:
        torch.testing.assert_close(found, exact)


def test_top_k_holds_for_each_token_of_a_sequence():
    logits = distributions(12, sharpness=2.0).reshape(5, 10, 12)
    found = spread(*squeeze(logits, 3), 12)
    torch.testing.assert_close(found.flatten(0, 1), spread(*squeeze(logits.flatten(0, 1), 3), 12))


def test_classes_that_are_masked_out_stay_so_in_top_k():
    logits = torch.tensor([[1.0, 2.0, -math.inf, -math.inf]])
    found = spread(*squeeze(logits, 2), 4)
    torch.testing.assert_close(found, logits.log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_top_k_comes_back_from_the_disk_as_log_probabilities(tmp_path, dtype):
    everything(full(tmp_path, top_k=2, dtype=dtype))
    found = everything(cached(Teacher(), views(), tmp_path, top_k=2, dtype=dtype))[""]
    exact = Teacher().eval()(views().batch(range(24))[0])
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(24))
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # 2^-11 of logarithms down to -8
    torch.testing.assert_close(found, spread(*squeeze(exact, 2), CLASSES), atol=tolerance, rtol=0)
    assert train(Teacher(), tmp_path / "trains", top_k=2).history


@pytest.mark.parametrize("top_k", [0, -1, True, 2.0, CLASSES])
def test_top_k_must_leave_something_over(tmp_path, top_k):
    with pytest.raises(RecipeError, match=f"top_k is {top_k}"):
        full(tmp_path, top_k=top_k)
    assert not list(tmp_path.iterdir())


# What becomes of it when processes die, or are two


def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    command = [sys.executable, remembering.__file__, "train", tmp_path / "cache", tmp_path / "state", "10"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "state").exists()
    resumed = train(Teacher(), tmp_path / "cache", checkpoint=tmp_path / "state")
    whole = train(Teacher(), tmp_path / "other")
    assert weights(resumed) == weights(whole)
    assert [row["terms"] for row in resumed.history] == [row["terms"] for row in whole.history]
    assert records(tmp_path / "cache").read_bytes() == records(tmp_path / "other").read_bytes()


class Stop(Exception):  # noqa: N818
    pass


def test_filling_goes_on_where_it_was_broken_off(tmp_path):
    def stop(done, _total):
        if done >= 20:
            raise Stop

    with pytest.raises(Stop):
        fill(cached(Teacher(), views(8), tmp_path / "cache", taps=TAPS), forward, batch_size=3, progress=stop)
    teacher, seen = Teacher(), []
    cache = cached(teacher, views(8), tmp_path / "cache", taps=TAPS)
    assert cache.missing().tolist() == list(range(21, 8 * SIZE))
    fill(cache, forward, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert sum(teacher.rows) == 8 * SIZE - 21
    assert seen[0] == (24, 8 * SIZE)
    assert seen[-1] == (8 * SIZE, 8 * SIZE)
    full(tmp_path / "whole", views(8), taps=TAPS)
    assert records(tmp_path / "cache").read_bytes() == records(tmp_path / "whole").read_bytes()


def test_a_record_that_was_torn_anywhere_is_made_anew(tmp_path, caplog):
    shown = views()
    full(tmp_path, shown, taps=TAPS)
    path = records(tmp_path)
    whole = path.read_bytes()
    size = np.load(path, mmap_mode="r").itemsize
    start = len(whole) - size
    for cut in range(size):
        # A part was written, of what had been zeros.
        path.write_bytes(whole[: start + cut] + bytes(size - cut))
        there = not any(whole[start + cut :])
        assert len(cached(Teacher(), shown, tmp_path, taps=TAPS).missing()) == (0 if there else 1), cut
    path.write_bytes(whole[:-4] + bytes([1, 2, 3, 4]))
    with caplog.at_level(logging.WARNING, "slivo"):
        fill(cached(Teacher(), shown, tmp_path, taps=TAPS), forward)
    assert "1 records are damaged" in caplog.text
    assert path.read_bytes() == whole


def test_two_processes_may_fill_one_cache(tmp_path):
    command = [sys.executable, remembering.__file__, "fill", tmp_path / "cache"]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == b"ready\n"
    for process in both:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in both:
        process.communicate()
        assert process.returncode == 0
    assert len(cached(Teacher(), views(8), tmp_path / "cache", taps=TAPS).missing()) == 0
    # The checksums of the augmented samples are in the records, too: all processes saw the same views.
    full(tmp_path / "alone", views(8), taps=TAPS)
    assert records(tmp_path / "cache").read_bytes() == records(tmp_path / "alone").read_bytes()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_one_that_was_made_meanwhile_by_another_is_taken(tmp_path):
    shown = views()
    first, second = (cached(Teacher(), shown, tmp_path) for _ in range(2))
    first.outputs(forward, shown.batch([0, 1]), [])
    second.outputs(forward, shown.batch([2, 3]), [])
    assert first.missing().tolist() == second.missing().tolist() == list(range(4, 24))


# What it refuses


STALE = {
    "checksum [0-9a-f]{12}, now": lambda path: cached(Teacher(seed=1), views(), path),
    "a number of samples of 12, now 11": lambda path: cached(
        Teacher(), Views(Subset(data(), range(11)), count=2, augment=roll), path
    ),
    "other data": lambda path: cached(
        Teacher(), Views(TensorDataset(data().tensors[0] + 1, torch.arange(SIZE)), count=2, augment=roll), path
    ),
    "another augmentation": lambda path: cached(
        Teacher(), Views(data(), count=2, augment=lambda sample: (roll(sample)[0] + 1, 0)), path
    ),
    "a number of views of 2, now 3": lambda path: cached(Teacher(), views(3), path),
    "views of seed 0, now 1": lambda path: cached(Teacher(), views(seed=1), path),
    r"taps \[''\], now \['', 'head'\]": lambda path: cached(Teacher(), views(), path, taps=["", "head"]),
    "top_k None, now 2": lambda path: cached(Teacher(), views(), path, top_k=2),
    " dtype float32, now float16": lambda path: cached(Teacher(), views(), path, dtype=torch.float16),
    "feature_dtype float16, now float32": lambda path: cached(Teacher(), views(), path, feature_dtype=torch.float32),
}


@pytest.mark.parametrize("reason", STALE)
def test_a_stale_cache_is_refused_with_the_reason(tmp_path, reason):
    full(tmp_path)
    with pytest.raises(ArtifactError, match=rf"was made with.*{reason}.*; give another folder, or remove") as caught:
        STALE[reason](tmp_path)
    assert "\n" not in str(caught.value)
    assert len(cached(Teacher(), views(), tmp_path).missing()) == 0


def test_another_format_is_refused(tmp_path):
    full(tmp_path)
    manifest = tmp_path / "cache.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ArtifactError, match="made with format 2, now 1"):
        cached(Teacher(), views(), tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shapes": 3}', '{"shapes": {"": 3}}'])
def test_a_damaged_description_is_refused(tmp_path, text):
    full(tmp_path)
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"cannot be read .*; remove it"):
        cached(Teacher(), views(), tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    full(tmp_path)
    path = records(tmp_path)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:50], b"x" + whole[1:]):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"is damaged \(.+\); remove it to fill it anew"):
            cached(Teacher(), views(), tmp_path)
    np.save(path, np.zeros(3))
    with pytest.raises(ArtifactError, match="another form"):
        cached(Teacher(), views(), tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        cached(Teacher(), views(), tmp_path)


def test_a_flipped_bit_anywhere_in_a_record_is_noticed(tmp_path):
    shown = views()
    full(tmp_path, shown)
    path = records(tmp_path)
    whole = bytearray(path.read_bytes())
    size = np.load(path, mmap_mode="r").itemsize
    for place in range(len(whole) - size, len(whole)):
        whole[place] ^= 4
        path.write_bytes(whole)
        assert cached(Teacher(), shown, tmp_path).missing().tolist() == [2 * SIZE - 1]
        whole[place] ^= 4


def test_records_in_each_others_place_or_of_another_cache_are_noticed(tmp_path):
    full(tmp_path / "one")
    full(tmp_path / "other", teacher=Teacher(seed=1))
    one, other = records(tmp_path / "one"), records(tmp_path / "other")
    whole = one.read_bytes()
    rows = np.load(one)
    swapped = rows.copy()
    swapped[[3, 7]] = rows[[7, 3]]
    one.write_bytes(whole[: -rows.nbytes] + swapped.tobytes())
    assert cached(Teacher(), views(), tmp_path / "one").missing().tolist() == [3, 7]
    one.write_bytes(other.read_bytes())
    assert len(cached(Teacher(), views(), tmp_path / "one").missing()) == 24


def test_batches_without_keys_or_with_others_are_refused(tmp_path):
    cache = full(tmp_path)
    batch = cache.data.batch([0, 1])
    for other in (batch[:2], batch[0], views(seed=1).batch([0]), (batch[0], torch.zeros(2, 4, dtype=torch.int64))):
        with pytest.raises(SlivoError, match="has no keys of the views"):
            cache.outputs(forward, other, [""])


def test_a_task_of_other_data_than_views_is_refused(tmp_path):
    held = data()
    task = classification("plain", held, held, held, classes="abcde", example_inputs=(held.tensors[0][:2],))
    with pytest.raises(SlivoError, match="distill with a task whose training data they are"):
        distill(remembering.Student(), full(tmp_path), task, [losses.kd()], epochs=1)


def test_a_place_that_is_not_kept_is_named(tmp_path):
    cache = full(tmp_path, taps=["features"])
    with pytest.raises(SlivoError, match=r"does not keep '' but 'features'; fill another"):
        cache.outputs(forward, cache.data.batch([0]), [""])


def test_inputs_that_are_not_those_of_the_cache_are_refused(tmp_path):
    full(tmp_path)

    def own(sample, generator=torch.Generator().manual_seed(0)):  # noqa: B008
        """Draw from a generator of its own after the data set has been looked at."""
        return sample[0] + torch.rand((), generator=generator), sample[1]

    torn = Views(data(), count=2, augment=own)
    cache = cached(Teacher(), torn, tmp_path / "own")
    cache.outputs(forward, torn.batch([3]), [])
    with pytest.raises(SlivoError, match=r"sample 3 in view 0 .* random generator of its own"):
        cache.outputs(forward, torn.batch([3]), [])


def test_inputs_that_are_mixed_behind_the_views_are_noticed(tmp_path):
    shown = views()
    cache = full(tmp_path, shown, taps=["", "features"])
    inputs, labels, keys = shown.batch([0, 1, 2])
    cache.outputs(forward, (inputs, labels, keys), [])
    with pytest.raises(SlivoError, match="changed or mixed behind the views"):
        cache.outputs(forward, (0.5 * inputs + 0.5 * inputs.flip(0), labels, keys), [])
    top = full(tmp_path / "top", shown, top_k=2)
    with pytest.raises(SlivoError, match="changed or mixed behind the views"):
        top.outputs(forward, (inputs + 1, labels, keys), [])


def test_a_teacher_that_changes_adds_nothing(tmp_path):
    teacher, shown = Teacher(), views()
    cache = cached(teacher, shown, tmp_path)
    cache.outputs(forward, shown.batch([0]), [])
    with torch.no_grad():
        teacher.head.bias.add_(0)
    cache.outputs(forward, shown.batch([1]), [])
    with torch.no_grad():
        teacher.head.bias.add_(1)
    with pytest.raises(SlivoError, match="changed while it taught"):
        cache.outputs(forward, shown.batch([2]), [])
    assert cache.missing().tolist() == list(range(2, 24))


def test_a_checkpoint_of_another_memory_is_refused(tmp_path):
    train(Teacher(), tmp_path / "all", checkpoint=tmp_path / "state", epochs=1)
    with pytest.raises(ArtifactError, match="another distillation"):
        train(Teacher(), tmp_path / "some", checkpoint=tmp_path / "state", epochs=1, top_k=2)


def test_options_out_of_range_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no taps"):
        cached(Teacher(), views(), tmp_path, taps=[])
    with pytest.raises(RecipeError, match="top_k is 2"):
        cached(Teacher(), views(), tmp_path, taps=["head"], top_k=2)
    with pytest.raises(RecipeError, match=r"feature_dtype is torch.int8; it must be one of torch.float16"):
        cached(Teacher(), views(), tmp_path, feature_dtype=torch.int8)
    with pytest.raises(SlivoError, match=r"the teacher .* has no module 'neck'"):
        cached(Teacher(), views(), tmp_path, taps=["neck"])


# Disks


def test_a_full_disk_is_told_and_what_is_there_stays_good(tmp_path):
    shown = views()
    cache = cached(Teacher(), shown, tmp_path)
    cache.outputs(forward, shown.batch([0, 1]), [])
    rows, seen = np.load(records(tmp_path), mmap_mode="r"), []
    for inside in (0, rows.itemsize // 2):  # the write of a record fails, or writes a part
        for size in (4, 1):
            with (
                largest_file(rows.offset + 10 * rows.itemsize + inside),
                pytest.raises(ArtifactError, match=r"cannot be written: .*what it holds so far stays good"),
            ):
                fill(cache, forward, batch_size=size, progress=lambda done, total: seen.append(done))
        assert seen[-1] == 10
        assert cached(Teacher(), shown, tmp_path).missing().tolist() == list(range(10, 24))
    fill(cache, forward)
    full(tmp_path / "whole", shown)
    assert records(tmp_path).read_bytes() == records(tmp_path / "whole").read_bytes()


def test_a_disk_too_small_for_all_is_told_before_the_first_record(tmp_path):
    huge = Views(data(), count=10**13, augment=roll)
    cache = cached(Teacher(), huge, tmp_path)
    with pytest.raises(ArtifactError, match=r"needs \d.* GB and there are .*: make room, or keep less"):
        cache.outputs(forward, huge.batch([0]), [])
    with largest_file(200), pytest.raises(ArtifactError, match="cannot be written: File too large"):
        full(tmp_path / "small")
    assert not (tmp_path / "small" / "cache.json").exists()
    full(tmp_path / "small")


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be read"):
        full(tmp_path / "file" / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        full(tmp_path / "cache")


def test_a_full_cache_serves_without_being_written(tmp_path):
    full(tmp_path, taps=TAPS, feature_dtype=torch.float32)
    for path in (*tmp_path.iterdir(), tmp_path):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    try:
        assert weights(train(Teacher(), tmp_path)) == weights(train(Teacher(), None))
    finally:
        tmp_path.chmod(0o700)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_description_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="cannot be written: Is a directory"):
        publish(tmp_path / "taken", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_teacher_on_another_device_is_a_copy_with_the_same_memory(tmp_path):
    cache = cached(Teacher(), views(), tmp_path)
    cache.sync()
    assert cache.to(torch.device("cpu")) is cache
    cache.outputs(forward, cache.data.batch([3, 4]), [])
    moved = cache.to(torch.device("meta"))
    assert moved.model.head.weight.device.type == "meta"
    assert cache.model.head.weight.device.type == "cpu"
    assert moved.missing().tolist() == cache.missing().tolist()
    assert moved.lesson == cache.lesson
