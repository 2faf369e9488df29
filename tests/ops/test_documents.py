"""Facts derived from cu_seqlens on the host."""

import pytest
import torch

from ops import documents


def cu(*edges):
    return torch.tensor(edges, dtype=torch.int32)


@pytest.mark.parametrize(
    "edges, lengths", [((0, 5), [5]), ((0, 0, 3, 3, 8, 8), [3, 5]), ((0, 4, 8), [4, 4]), ((0, 0), [])]
)
def test_lengths_leave_out_empty_documents(edges, lengths):
    assert documents.lengths(cu(*edges)) == lengths


def test_a_moved_tensor_is_never_read_back():
    """The meta device has no numbers to read: what is known about it came from the host."""
    moved = documents.to_device(cu(0, 3, 8), "meta")
    assert moved.is_meta and documents.bounds(moved) == [0, 3, 8] and documents.lengths(moved) == [3, 5]
    documents.check(moved, num_rows=1, num_tokens=8)


def test_what_is_derived_in_inference_mode_can_be_saved_for_backward_later():
    edges = cu(0, 3, 8)
    with torch.inference_mode():
        ids = documents.document_ids(edges)
    assert not ids.is_inference() and documents.document_ids(edges) is ids


def test_derived_facts_follow_a_write():
    edges = cu(0, 3, 8)
    assert documents.lengths(edges) == [3, 5]
    edges[1] = 4
    assert documents.lengths(edges) == [4, 4]
