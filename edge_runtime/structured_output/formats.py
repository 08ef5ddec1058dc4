"""Values of `format` → regular expressions that llguidance can enforce, or mere annotations.

llguidance's own expressions accept what readers refuse (30 February, the year 0, the second 60, a domain without a
dot), so those here are narrower: every string that matches is valid for strict readers, too.

Sources: JSON Schema 2020-12 Validation section 7.3, RFC 3339, RFC 5321, RFC 6901, RFC 4648;
OpenAPI's format registry.
"""

from __future__ import annotations

_MONTH_AND_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = f"(?:{_YEAR}-{_MONTH_AND_DAY}|{_LEAP_YEAR}-02-29)"
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_TIME = f"{_CLOCK}(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_NUMBER = "[0-9]{1,3}"
_OF_A_DAY = f"T(?:{_NUMBER}H(?:{_NUMBER}M(?:{_NUMBER}S)?)?|{_NUMBER}M(?:{_NUMBER}S)?|{_NUMBER}S)"
_OF_DAYS = f"(?:{_NUMBER}Y(?:{_NUMBER}M(?:{_NUMBER}D)?)?|{_NUMBER}M(?:{_NUMBER}D)?|{_NUMBER}D)"
_LOCAL = r"[A-Za-z0-9_'+\-]{1,20}"
_EMAIL = rf"{_LOCAL}(?:\.{_LOCAL}){{0,2}}@(?:[A-Za-z0-9]{{1,30}}(?:-[A-Za-z0-9]{{1,30}})?\.){{1,3}}[A-Za-z]{{2,24}}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_HEX = "[0-9a-fA-F]"
_BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_BASE64_URL = "(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?"


def _uuid(version: int) -> str:
    return f"^{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}$"


PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": f"^P(?:{_OF_DAYS}(?:{_OF_A_DAY})?|{_OF_A_DAY}|{_NUMBER}W)$",
    "email": f"^{_EMAIL}$",
    "idn-email": f"^{_EMAIL}$",
    "ipv4": f"^{_IPV4}$",
    "json-pointer": "^(?:/(?:[^/~]|~[01])*)*$",
}
"""Formats of JSON Schema that are enforced by these expressions."""

BY_GRAMMAR = {
    "hostname": "hostname",
    "idn-hostname": "hostname",
    "ipv6": "ipv6",
    "uuid": "uuid",
    "uri": "uri",
    "iri": "uri",
    "uri-reference": "uri",
    "iri-reference": "uri",
}
"""Formats of JSON Schema that llguidance enforces under this name; its strings are valid for the wider ones, too."""

KNOWN = (*PATTERNS, *BY_GRAMMAR)

WHERE_IT_FITS = {
    "base64": f"^{_BASE64}$",
    "byte": f"^{_BASE64}$",
    "base64url": f"^{_BASE64_URL}$",
    "ip": f"^{_IPV4}$",
    "ipvanyaddress": f"^{_IPV4}$",
    "ipvanyinterface": f"^{_IPV4}$",
    "ipvanynetwork": f"^{_IPV4}$",
    "cidrv4": rf"^{_IPV4}/(?:3[0-2]|[12]?[0-9])$",
    "guid": f"^{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}$",
    **{f"uuid{version}": _uuid(version) for version in range(1, 9)},
}
"""Formats of other tools (pydantic, OpenAPI, zod): enforced unless another keyword contradicts, else ignored."""

RANGES = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**53 - 1),
}
"""Formats of integers (OpenAPI) and their ranges."""
