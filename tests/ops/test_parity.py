"""Every op's examples: right on the reference, and enough to judge any implementation's accepts() by."""

from importlib import import_module

import pytest
import torch

from ops import discover, parity, registry

OPS = list(discover.scan())


@pytest.mark.parametrize("op", OPS)
def test_the_reference_passes_its_own_examples(op):
    found = parity.compare(op, "small", device="cpu")
    assert found["status"] == "ok", found
    names = import_module(discover.catalog().packages[op]).__all__
    assert {case["function"] for case in found["cases"]} == set(names), "an example for every public function"


@pytest.mark.parametrize("op", OPS)
def test_accepts_reads_no_values(op):
    """On meta tensors there are none: an implementation that looks at one raises here."""
    module = import_module(f"{discover.catalog().packages[op]}.examples")
    for name, backend in discover.descriptors().items():
        if name not in discover.scan()[op] or registry.why_not(op, backend):
            continue
        accepts = getattr(import_module(discover.catalog().files[op][name].module), "accepts", None)
        for function, args, kwargs in module.examples("small") if accepts else ():
            meta = parity._moved((args, kwargs), lambda x: x.to("meta"))
            assert accepts(function, *meta[0], **meta[1]) == accepts(function, *args, **kwargs)


def test_differences_that_no_comparison_may_miss():
    one, nan = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, float("nan")], dtype=torch.float64)
    infinite = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
    assert parity._distance(nan, one) == parity._distance(infinite, one) == float("inf")
    assert parity._distance(infinite, infinite) == 0
    assert parity._distance(one, infinite) == float("inf")
