"""placeholder until the chunked backend lands in the next commit"""

from osdn.ops.reference import online_scaled_delta_rule, precondition  # noqa: F401
