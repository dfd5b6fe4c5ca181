"""Tasks that build their data: `mqar` (recall), `text` (bytes of local files). A batch is a function of its seed."""

from osdn.data.mqar import MQAR
from osdn.data.text import ByteText, ar_hits

__all__ = ["MQAR", "ByteText", "ar_hits"]
