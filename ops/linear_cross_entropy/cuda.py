"""Output layer and cross-entropy on NVIDIA GPUs: Triton for the softmax, torch for the products.

The products that make the gradient of weight are added to it in fp32 by the matmul itself.
"""

from __future__ import annotations

from ops.linear_cross_entropy.launch import Implementation

accepts, linear_cross_entropy = Implementation("cuda").functions()
