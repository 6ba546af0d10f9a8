"""Where quotes hold the report data, and how long they are.

This is enough to see that a quote answers our question. Signatures are the verifier's business.
"""

import struct

from tsqp.errors import AttestationError

SNP_REPORT_BYTES = 1184
SNP_REPORT_DATA = slice(0x50, 0x90)

HEADER_BYTES = 48
V5_DESCRIPTOR_BYTES = 6  # type and size of the body
# By the header's TEE type: the place of the report data in the body, and the body's size before v5.
_BODIES = {0: (320, 384), 0x81: (520, 584)}
_TEES = {"sgx": 0, "tdx": 0x81}


def cut_quote(platform: str, padded: bytes) -> tuple[bytes, bytes]:
    """A quote without the padding that may follow it, and the report data in it.

    Args:
        platform: "sgx", "tdx" or "sev-snp".
        padded: what the platform gave.

    Returns:
        the quote, and its 64 bytes of report data.

    Raises:
        AttestationError: this is not a quote of the platform, or it is cut short.
    """
    try:
        if platform == "sev-snp":
            length, data = SNP_REPORT_BYTES, SNP_REPORT_DATA
        else:
            length, data = _measure(_TEES[platform], padded)
    except struct.error:
        raise AttestationError(f"The platform's {platform} quote is cut short.") from None
    if len(padded) < length or padded[length:].strip(b"\0"):
        raise AttestationError(
            f"The platform's {platform} quote has {len(padded)} bytes instead of {length}."
        )
    return padded[:length], padded[data]


def _measure(expected: int, quote: bytes) -> tuple[int, slice]:
    """The length of a quote of SGX or TDX, and where its report data is."""
    version, _, tee = struct.unpack_from("<HHI", quote)
    if version not in (3, 4, 5) or tee != expected:
        raise AttestationError(
            f"The platform gave a quote of version {version} and TEE type {tee:#x}, which is not "
            "supported."
        )
    place, size = _BODIES[tee]
    body = HEADER_BYTES
    if version == 5:
        _, size = struct.unpack_from("<HI", quote, HEADER_BYTES)
        body += V5_DESCRIPTOR_BYTES
    (signature_bytes,) = struct.unpack_from("<I", quote, body + size)
    return body + size + 4 + signature_bytes, slice(body + place, body + place + 64)
