"""What the plan of the device's memory promises the rest of the backend; no GPU needed."""

import pytest
from test_lowering import H100, program, recipe

from rvllm.backends.base import MOST_BIASES, MOST_STOPS
from rvllm.backends.cuda.sampling import START_WORDS
from rvllm.config import EngineConfig


@pytest.mark.parametrize(("seqs", "longest"), [(8, 4096), (512, 131072), (256, 262144), (1024, 262144)])
def test_the_longest_request_with_every_list_full_fits_the_buffer_of_starting_slots(
    seqs: int, longest: int
) -> None:
    config = EngineConfig(max_num_seqs=seqs, num_gpu_blocks=longest // 16)
    plan = recipe(program(num_hidden_layers=1, max_position_embeddings=longest), H100, config).memory
    assert plan.longest == longest and plan.seqs == seqs
    assert plan.start_words - seqs * START_WORDS >= longest + 2 * MOST_BIASES + MOST_STOPS
