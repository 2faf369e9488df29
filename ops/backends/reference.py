"""reference: plain torch on any device. The CPU's training backend, and the truth for all other backends."""

from ops.backends import Backend

BACKEND = Backend(name="reference", rank=100, probe=lambda facts: (True, "plain torch runs anywhere"))
