# SPDX-License-Identifier: Apache-2.0
"""The C interface of csrc/cuda: a wrong launch argument is an exception that names it, and nothing
is launched; on the library itself where it was built, and on the emulated one everywhere."""

import ctypes

import emulated
import pytest
import torch

from stamina_kernels import cuda, cuda_interface

ADDRESS = 1 << 20  # never read: these launches are refused
NULL, ODD = 0, ADDRESS + 1
BEYOND_INT32 = 1 << 31
MEMBER = {
    **dict.fromkeys(("weight", "weight_init", "A", "B", "U", "V", "b"), ADDRESS),
    "out_features": 6, "rank": 4, "mask_rank": 3, "dtype": 2, "layer_id": 1, "row0": 0, "col0": 0,
}  # fmt: skip
GROUP = {"members": [MEMBER, MEMBER], "count": 2, "in_features": 40}
DRAWN = {"seed": ADDRESS, "step": ADDRESS, "hard": 0}
STREAM = {"stream": 0}
ARGUMENTS = {
    "sample": {**GROUP, **DRAWN, "bits": ADDRESS, **STREAM},
    "compose": {
        **GROUP, "scale": ADDRESS, "bits": ADDRESS, "dtype": 0, "effective": ADDRESS, **STREAM,
    },
    "sample_compose": {
        **GROUP, "scale": ADDRESS, **DRAWN, "relu": 0, "dtype": 1, "effective": ADDRESS,
        "bits": ADDRESS, "forget": ADDRESS, "sparse": ADDRESS, "counts": ADDRESS,
        "scratch": ADDRESS, "scratch_bytes": 1 << 20, **STREAM,
    },
    "backward": {
        **GROUP, "members": [MEMBER | {"out_features": 8, "row0": 0}] * 2, "dy": ADDRESS,
        "x": ADDRESS, "tokens": 5, "scale": ADDRESS, "tau": ADDRESS, "seed": ADDRESS,
        "step": ADDRESS, "g_forget": ADDRESS, "g_sparse": ADDRESS, "hard": 0, "relu": 0, "dtype": 2,
        "bits": ADDRESS, "gradients": ADDRESS, "scratch": ADDRESS, "scratch_bytes": 1 << 20,
        **STREAM,
    },
    "fold": {
        "layers": [
            {"weight": ADDRESS, "weight_init": ADDRESS, "out_features": 6, "in_features": 40,
             "dtype": 1, "adapters": 2}
        ],
        "layer_count": 1,
        "adapters": [{"A": ADDRESS, "B": ADDRESS, "bits": ADDRESS, "rank": 4, "coefficient": 1.0}]
        * 2,
        "adapter_count": 2, "overflow": ADDRESS, "scratch": ADDRESS, "scratch_bytes": 1 << 20,
        **STREAM,
    },
}  # fmt: skip
TABLES = {
    "members": cuda_interface.Member,
    "layers": cuda_interface.Layer,
    "adapters": cuda_interface.Adapter,
}
# what an operation does not read, or may be null
UNREAD = {
    "sample": ("weight", "weight_init", "A", "B", "rank", "dtype"),
    "compose": ("U", "V", "b", "mask_rank", "layer_id", "row0", "col0"),
}
WRONG_NUMBERS = {
    "count": (0, -1),
    "in_features": (0, -40, BEYOND_INT32 - 1, 1 << 62),
    "out_features": (0, -6, BEYOND_INT32),
    "rank": (0, -4, BEYOND_INT32),
    "mask_rank": (0, -3, BEYOND_INT32),
    "dtype": (-1, 3, 1 << 40),
    "layer_id": (-1, 1 << 32),
    "row0": (-1, (1 << 32) - 5),
    "col0": (-1, (1 << 34) - 39),
    "scratch_bytes": (0, -1, 15),
    "tokens": (-1, BEYOND_INT32 - 1),
    "layer_count": (0, -1),
    "adapter_count": (0, 1, 3),
    "adapters": (0, -1, 3),
}
ANYTHING_GOES = ("hard", "relu", "coefficient", "stream")


def wrong_values(operation, name):
    if name in WRONG_NUMBERS:
        return WRONG_NUMBERS[name]
    return (ODD,) if name == "weight_init" and operation != "fold" else (NULL, ODD)


def cases():
    for operation, arguments in ARGUMENTS.items():
        for name, value in arguments.items():
            if name in ANYTHING_GOES:
                continue
            if not isinstance(value, list):
                yield from ((operation, name, None, v) for v in wrong_values(operation, name))
                continue
            yield operation, name, None, []
            for field in value[0]:
                if field in ANYTHING_GOES or field in UNREAD.get(operation, ()):
                    continue
                for wrong in wrong_values(operation, field):
                    yield operation, name, field, wrong


def call(library, operation, arguments):
    values = []
    for name, value in arguments.items():
        if isinstance(value, list):
            table = [TABLES[name](**row) for row in value]
            value = (TABLES[name] * len(table))(*table) if table else None
        values.append(value)
    return getattr(library, f"stamina_{operation}")(*values)


@pytest.fixture(params=["built", "emulated"])
def library(request, monkeypatch):
    if request.param == "built" and not cuda._LIBRARY.exists():
        pytest.skip("_cuda.so was not built; it needs nvcc")
    chosen = cuda._library() if request.param == "built" else emulated.library()
    monkeypatch.setattr(cuda, "_library", lambda: chosen)
    return chosen


def test_every_wrong_argument_is_an_exception_that_names_it(library):
    checked = 0
    for operation, name, field, wrong in cases():
        arguments = dict(ARGUMENTS[operation])
        if field is None:
            arguments[name] = wrong
        else:
            arguments[name] = [*arguments[name][:-1], {**arguments[name][-1], field: wrong}]
        with pytest.raises(ValueError) as error:
            cuda_interface.check(library, call(library, operation, arguments))
            pytest.fail(f"{operation} accepted {name} {field} = {wrong}")
        last = len(arguments[name]) - 1 if field else 0
        named = name if field is None else f"{name}[{last}].{field}"
        assert named in str(error.value), (operation, name, field, wrong)
        checked += 1
    assert checked > 150


NOT_SERVED = {
    "members": [{"rank": 17}, {"mask_rank": 17}, {"rank": 3}, {"mask_rank": 4}, {"col0": 2},
                {"out_features": 12}, {"weight": ADDRESS + 2}, {"weight_init": ADDRESS + 2},
                {"dtype": 1}],
    "dtype": [0, 1],
    "in_features": [44],
}  # fmt: skip


def test_the_backward_refuses_what_it_does_not_serve(library):
    fields = ("members", "count", "in_features", "dy", "x", "dtype")
    for name, values in NOT_SERVED.items():
        for value in values:
            arguments = dict(ARGUMENTS["backward"])
            if name == "members":
                first, last = arguments["members"]
                value = [first, last | value]
            arguments[name] = value
            size = {field: arguments[field] for field in fields}
            assert call(library, "backward_scratch_bytes", size) == 0, (name, value)
            with pytest.raises(ValueError, match="members must be a group that stamina_backward"):
                cuda_interface.check(library, call(library, "backward", arguments))
    size = {field: ARGUMENTS["backward"][field] for field in fields}
    assert call(library, "backward_scratch_bytes", size) > 0
    for misaligned in ("dy", "x"):
        assert call(library, "backward_scratch_bytes", size | {misaligned: ADDRESS + 2}) == 0
    for wrong in ({"in_features": 0}, {"dtype": 3}):
        assert call(library, "backward_scratch_bytes", size | wrong) == -1
    for name in ("dy", "x", "scratch"):
        with pytest.raises(ValueError, match=f"{name} must be aligned to 16 bytes"):
            arguments = ARGUMENTS["backward"] | {name: ADDRESS + 8}
            cuda_interface.check(library, call(library, "backward", arguments))


def test_more_tasks_than_a_grid_has_are_refused(library):
    tall = {**MEMBER, "out_features": BEYOND_INT32 - 1}
    arguments = {**ARGUMENTS["sample"], "members": [tall] * 2, "in_features": 1 << 20}
    with pytest.raises(ValueError, match="number of tasks of the group must be at most 2147483647"):
        cuda_interface.check(library, call(library, "sample", arguments))
    huge = {"out_features": BEYOND_INT32 - 1, "in_features": 1 << 20}
    layers = [ARGUMENTS["fold"]["layers"][0] | huge]
    with pytest.raises(
        ValueError, match=r"layers\[0\].the number of tasks must be at most 16777215"
    ):
        arguments = {**ARGUMENTS["fold"], "layers": layers}
        cuda_interface.check(library, call(library, "fold", arguments))


def test_scratch_sizes_refuse_what_the_launch_would(library):
    table = (cuda_interface.Member * 1)(cuda_interface.Member(**MEMBER))
    assert library.stamina_scratch_bytes(table, 1, 40) > 0
    assert library.stamina_scratch_bytes(table, 1, 0) == -1
    assert library.stamina_scratch_bytes(None, 1, 40) == -1
    assert b"members must not be null" in library.stamina_error()


def test_without_a_driver_a_launch_is_an_exception():
    if not cuda._LIBRARY.exists() or torch.cuda.is_available():
        pytest.skip("needs the built library and no GPU")
    with pytest.raises(RuntimeError, match="cuda: launch failed: "):
        cuda_interface.check(cuda._library(), call(cuda._library(), "sample", ARGUMENTS["sample"]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.double(), TypeError, "U must be of dtype torch.float32, got torch.float64"),
        (lambda t: t.to("meta"), ValueError, "U must be on device cpu, got meta"),
        (lambda t: t.t().contiguous().t(), ValueError, r"U must be contiguous, got strides"),
    ],
)
def test_tensors_that_the_kernels_would_misread_are_refused(change, error, message):
    zero = torch.tensor(0)
    U, V, b = torch.zeros(4, 3), torch.zeros(3, 40), torch.tensor(0.0)
    with emulated.emulated():
        cuda.sample([U], [V], [b], zero, zero, [0], [0], [0], True)
        with pytest.raises(error, match=message):
            cuda.sample([change(U)], [V], [b], zero, zero, [0], [0], [0], True)


def test_structures_match_the_header():
    assert ctypes.sizeof(cuda_interface.Member) == 14 * 8
    assert ctypes.sizeof(cuda_interface.Adapter) == 5 * 8
    assert ctypes.sizeof(cuda_interface.Layer) == 6 * 8
