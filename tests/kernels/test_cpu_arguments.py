# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.stamina_cpu` called directly: wrong arguments raise RuntimeError, and never crash."""

import pytest
import torch
from corruptions import make_mlp
from oracle import make_problem
from test_cpu import in_child

from stamina_kernels import backends

if backends()["cpu"] is not None:
    pytest.skip(f"backend 'cpu': {backends()['cpu']}", allow_module_level=True)

LIBRARY = torch.ops.stamina_cpu
ROWS, COLUMNS, TOKENS, RANK, MASK_RANK = (6, 9), 40, 3, 4, 3


def group():
    problem = make_problem(list(ROWS), COLUMNS, (TOKENS,), rank=RANK, mask_rank=MASK_RANK)
    return problem, {f: [getattr(p, f) for p in problem.group] for f in "ABUVb"}


def valid(operation):
    """Arguments that the operation accepts."""
    problem, factors = group()
    logits = {name: factors[name] for name in "UVb"}
    where = {"layer_id": [0, 1], "row0": [0, 5], "col0": [0, 3], "hard": False}
    stream = {"seed": problem.seed, "step": problem.step}
    weight = [p.weight for p in problem.group]
    initial = [p.weight_init for p in problem.group]
    bits = torch.full((sum(ROWS), 2), 5, dtype=torch.int32)
    one, g = torch.tensor(1.0), torch.ones(2)
    if operation == "sample":
        return {**logits, **stream, **where}
    if operation == "compose":
        A, B = factors["A"], factors["B"]
        arguments = {"weight": weight, "A": A, "B": B, "bits": bits, "scale": one}
        return {**arguments, "dtype": torch.float32}
    if operation == "masked_linear":
        return {
            "x": problem.x, "weight": weight, "bias": [torch.zeros(sum(ROWS))], **factors,
            "weight_init": initial, "scale": one, **stream, **where, "sparse_kind": "sigmoid",
        }  # fmt: skip
    if operation == "masked_linear_backward":
        return {
            "dy": problem.dy, "x": problem.x, "weight": weight, **factors, "weight_init": initial,
            "bits": bits, "scale": one, "tau": one, **stream, "g_forget": g, "g_sparse": g, **where,
            "sparse_kind": "relu", "need_dx": True,
        }  # fmt: skip
    if operation.startswith("embedding_mlp"):
        mlps = [make_mlp(6, 4, 7, 3), make_mlp(9, 5, 32, 2, transposed=True)]
        lists = {field: [getattr(mlp, field) for mlp in mlps] for field in MLP_FIELDS}
        dY = {"dY": [torch.ones(6, 3), torch.ones(2, 9)]} if "backward" in operation else {}
        return {**dY, **lists, "transposed": [0, 1]}
    assert operation == "fold_"
    return {
        "weight": weight, "weight_init": initial,
        "A": [factors["A"][k].half() for k in (0, 0, 1)],
        "B": [factors["B"][k].half() for k in (0, 0, 1)],
        "scale": [1.0, 2.0, 3.0], "bits": [bits[:6], bits[:6], bits[6:]], "first": [0, 2, 3],
    }  # fmt: skip


MLP_FIELDS = ("E", "W1", "b1", "W2", "b2")
OPERATIONS = (
    "sample", "compose", "masked_linear", "masked_linear_backward", "embedding_mlp",
    "embedding_mlp_backward", "fold_",
)  # fmt: skip
WRONG_LISTS = {
    "first": [[], [0], [0, 3], [0, 2, 4], [1, 2, 3], [0, 2, -3], [0, 5, 3], [0, -1, 3], [0, 2, 2]],
    "sparse_kind": ["", "l1", "Sigmoid"],
    "dtype": [torch.float64, torch.int8, torch.complex64],
}
OPTIONAL = ("bias", "weight_init")


def wrong_tensors(name, tensor):
    yield "dtype", tensor.double()
    yield "integers", tensor.to(torch.int16)
    yield "device", torch.empty_like(tensor, device="meta")
    yield "sparse", tensor.to_sparse()
    if tensor.dim() == 0:
        yield "two values", torch.stack([tensor, tensor])
        yield "no value", tensor.new_empty(0)
        return
    yield "strided", torch.stack([tensor, tensor], -1)[..., 0]
    yield "wider", torch.cat([tensor, tensor[..., :1]], -1)
    yield "narrower", tensor[..., 1:].contiguous()
    if tensor.dim() == 2:
        yield "a vector", tensor[0].clone()
        if name not in ("x", "dy"):
            yield "taller", torch.cat([tensor, tensor[:1]])
            yield "shorter", tensor[1:].clone()
            yield "three dimensions", tensor[None]
            yield "nothing", tensor.new_empty(0, 0)


def wrong_values(name, value):
    """What is wrong, and the value."""
    if isinstance(value, torch.Tensor):
        yield from wrong_tensors(name, value)
    elif name in WRONG_LISTS:
        yield from ((str(wrong), wrong) for wrong in WRONG_LISTS[name])
    elif isinstance(value, list):
        if name not in OPTIONAL:
            yield "empty", []
        yield "too long", [*value, value[0]]
        if len(value) > 1:
            yield "too short", value[:-1]
        for k, element in enumerate(value):
            if isinstance(element, torch.Tensor):
                for what, wrong in wrong_tensors(name, element):
                    yield f"[{k}] {what}", [*value[:k], wrong, *value[k + 1 :]]


CASES = [
    (operation, name, what)
    for operation in OPERATIONS
    for name, value in valid(operation).items()
    for what, _ in wrong_values(name, value)
]


def tensors_of(arguments):
    for value in arguments.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, torch.Tensor) and not (each.is_meta or each.is_sparse):
                yield each


# legal, though another argument would make them wrong: any batch; rows that only U or E knows of
ACCEPTED = {
    ("masked_linear", "x", "a vector"),
    *(("embedding_mlp", "E", f"[{k}] {what}") for k in (0, 1) for what in ("taller", "shorter")),
    *(("sample", "U", f"[{k}] {what}") for k in (0, 1) for what in ("taller", "shorter")),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_valid_arguments_are_accepted(operation):
    getattr(LIBRARY, operation)(**valid(operation))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_wrong_argument_raises_and_nothing_is_written(operation):
    cases = [case for case in CASES if case[0] == operation and case not in ACCEPTED]
    assert len(cases) > 50
    for _, name, what in cases:
        arguments = valid(operation)
        arguments[name] = dict(wrong_values(name, arguments[name]))[what]
        before = [t.clone() for t in tensors_of(arguments)]
        with pytest.raises(RuntimeError):
            getattr(LIBRARY, operation)(**arguments)
            pytest.fail(f"accepted {name}: {what}")
        for tensor, old in zip(tensors_of(arguments), before, strict=True):
            assert torch.equal(tensor, old), f"{name}: {what}"


@pytest.mark.parametrize("missing", ["rows", "ranks"])
def test_no_rows_and_rank_zero_do_not_end_the_process(missing):
    """The public functions refuse both; here either answer is right."""
    program = (
        "from test_cpu_arguments import LIBRARY, OPERATIONS, valid, without\n"
        "for name in OPERATIONS:\n"
        "    print(name, flush=True)\n"
        f"    try: getattr(LIBRARY, name)(**without({missing!r}, valid(name)))\n"
        "    except RuntimeError: pass\n"
    )
    assert in_child(program).split() == list(OPERATIONS)


def without(missing, arguments):
    """The arguments with no rows, or with rank zero."""
    if missing == "rows":
        for name in ("weight", "A", "U", "weight_init", "E"):
            if name in arguments:
                arguments[name] = [t[:0] for t in arguments[name]]
        if isinstance(arguments.get("bits"), list):
            arguments["bits"] = [t[:0] for t in arguments["bits"]]
        elif "bits" in arguments:
            arguments["bits"] = arguments["bits"][:0]
        if "bias" in arguments:
            arguments["bias"] = [t[:0] for t in arguments["bias"]]
        if "dy" in arguments:
            arguments["dy"] = arguments["dy"][:, :0].contiguous()
        return arguments
    for left, right in ("AB", "UV"):
        if left in arguments:
            arguments[left] = [t[:, :0].contiguous() for t in arguments[left]]
            arguments[right] = [t[:0] for t in arguments[right]]
    return arguments


def test_fold_refuses_a_list_of_first_adapters_that_leaves_the_lists():
    """Two layers of one shape, so that nothing else is wrong."""
    middles = [-(1 << 63), -1, 4, 1000]
    program = (
        "from test_cpu_arguments import LIBRARY, valid\n"
        "arguments = valid('fold_')\n"
        "for name, value in arguments.items():\n"
        "    arguments[name] = [value[0]] * len(value)\n"
        "arguments['weight'] = [w.clone() for w in arguments['weight']]\n"
        f"for middle in {middles}:\n"
        "    try: LIBRARY.fold_(**arguments | {'first': [0, middle, 3]})\n"
        "    except RuntimeError: print(middle, flush=True)\n"
    )
    assert in_child(program).split() == list(map(str, middles))


@pytest.mark.parametrize("operation", ["sample", "masked_linear", "masked_linear_backward"])
@pytest.mark.parametrize(
    ("name", "limit"), [("layer_id", 1 << 32), ("row0", 1 << 32), ("col0", 1 << 34)]
)
def test_coordinates_beyond_the_counter_are_refused(operation, name, limit):
    """Added to a row or a column they would overflow, or wrap to the bits of other elements."""
    for wrong in (-1, -(1 << 63), limit, (1 << 63) - 1):
        with pytest.raises(RuntimeError, match=name):
            getattr(LIBRARY, operation)(**valid(operation) | {name: [0, wrong]})


@pytest.mark.parametrize("size", [(-1, 4), (4, -1), (17, 4), (4, 129), (1 << 62, 1 << 62)])
def test_philox_words_refuse_more_than_a_tile(size):
    with pytest.raises(RuntimeError, match="rows and columns must fit one tile"):
        LIBRARY.philox_words(0, 0, 0, 0, 0, *size)


@pytest.mark.parametrize("name", ["mmx", "AVX2", " ", "x" * 1000])
def test_unknown_instruction_sets_are_refused_and_change_nothing(name):
    previous = LIBRARY.instruction_set("")
    with pytest.raises(RuntimeError, match="must be one of"):
        LIBRARY.instruction_set(name)
    assert LIBRARY.instruction_set("") == previous
