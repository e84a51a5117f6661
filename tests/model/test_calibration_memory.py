"""Bytes that live together, worked by hand for one shape."""

from moss_rlhf.model import memory
from moss_rlhf.model.anatomy import BlockShape
from moss_rlhf.model.cost import Dimensions

#                       hidden 8, head size 2, two blocks of 4 heads and 16 neurons, a table of 10 tokens
PLAIN = Dimensions(8, 2, (BlockShape(4, 16),) * 2, 0, projection_parameters=80)
NETWORK = memory.Network(PLAIN, parameters=1000, vocabulary=10)
SAMPLE = memory.Sample(rows=40, length=5, longest=6)


def test_a_batch_holds_at_most_32_rows():
    assert SAMPLE.batch_tokens == 32 * 6
    assert memory.Sample(3, 5, 6).batch_tokens == 18
    assert memory.Sample(40, 256, 300).batch_tokens == 6 * 300  # and at most 2,048 tokens


def test_states_are_of_each_stack_and_bounded():
    assert memory.states_bytes(NETWORK, SAMPLE) == 4 * 40 * 5 * 8
    crossing = Dimensions(8, 2, (BlockShape(4, 16), BlockShape(4, 16, 4)), 0)
    assert memory.states_bytes(memory.Network(crossing, 1, 0), SAMPLE) == 2 * 4 * 40 * 5 * 8
    assert memory.states_bytes(NETWORK, memory.Sample(10**9, 5, 6)) == 2**30


def test_grams_are_squares_of_what_a_block_reads():
    assert memory.block_inputs(BlockShape(4, 16), PLAIN) == [8, 8, 8, 16]
    assert memory.grams_bytes(NETWORK) == 4 * (8**2 + 8**2 + 8**2 + 16**2)
    assert memory.solver_bytes(NETWORK) == 16 * (16**2 + 16 * 8)


def test_a_calibration_is_its_parts():
    passing = 4 * 6 * 192 * (16 + 8)
    assert memory.calibration_bytes(NETWORK, SAMPLE) == 6400 + passing
    whole = memory.calibration_bytes(NETWORK, SAMPLE, grams=True, solves=True)
    assert whole == 6400 + passing + memory.grams_bytes(NETWORK) + memory.solver_bytes(NETWORK)


def test_gradients_keep_every_layer_and_the_logits_three_times():
    logits = 3 * 4 * 192 * 10
    assert memory.gradient_bytes(NETWORK, SAMPLE) == 160 * 8 * 2 * 192 + logits
    assert memory.gradient_bytes(NETWORK, SAMPLE, of_outputs=True) == (160 + 70) * 8 * 2 * 192 + logits
    classifier = memory.Network(PLAIN, parameters=1000, vocabulary=0)
    assert memory.gradient_bytes(classifier, SAMPLE) == 100 * 8 * 2 * 192
    assert memory.repair_bytes(NETWORK, SAMPLE) == 4000 + 2 * 6400 + 4 * 6 * 192 * 24 + 28 * 16**2
