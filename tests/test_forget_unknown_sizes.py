import onnx.parser
import pytest
from comparing import apply_and_compare

from graphopt.passes.forget_unknown_sizes import ForgetUnknownSizes

TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[A,B,C] x) => (float[A,B,C] y) { y = Relu (x) }'


def sizes_after(*declared):
    """How many inputs and outputs the pass rewrites, and their sizes; None where one is open."""
    model = onnx.parser.parse_model(TEXT)
    for each in (*model.graph.input, *model.graph.output):
        for size, said in zip(each.type.tensor_type.shape.dim, declared, strict=True):
            if isinstance(said, int):
                size.dim_value = said
            else:
                size.dim_param = said
    result, after = apply_and_compare(model, ForgetUnknownSizes())
    assert apply_and_compare(after, ForgetUnknownSizes())[0].rewrites == 0
    first, last = (
        [size.dim_param or size.dim_value or None for size in each.type.tensor_type.shape.dim]
        for each in (*after.graph.input, *after.graph.output)
    )
    assert first == last
    return result.rewrites, first


@pytest.mark.parametrize("unknown", ["?", "-1", "unk__3"])
def test_sizes_whose_name_says_nothing_are_open(unknown):
    assert sizes_after(unknown, 3, unknown) == (2, [None, 3, None])


def test_a_name_that_says_something_stays():
    assert sizes_after("batch", 3, "width") == (0, ["batch", 3, "width"])
