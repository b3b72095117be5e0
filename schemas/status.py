"""The closed vocabulary of what became of a row."""

SUCCESS = "success"
NO_IMAGE = "no_image"
SKIPPED = "skipped"
OK = "ok"

# docs/formats.md and the table in docs/commands.md say when each is given.
STATUSES: tuple[str, ...] = (
    SUCCESS,
    "bad_url",
    "dns_error",
    "connect_error",
    "tls_error",
    "timeout",
    "http_error",
    "protocol_error",
    "redirect_error",
    "blocked",
    "disallowed",
    "host_resting",
    "too_large",
    "truncated",
    "not_image",
    "decode_error",
    "decoder_crash",
    "bomb",
    "too_small",
    "bad_aspect",
    "hash_mismatch",
    "missing_file",
    NO_IMAGE,
    "removed",
)

# States of a feature row: computed, not selected, or why its pair has no image.
STATES: tuple[str, ...] = (OK, SKIPPED, *STATUSES[1:])

_TRANSIENT = frozenset({"dns_error", "connect_error", "timeout", "protocol_error", "host_resting", "truncated"})
_TRANSIENT_HTTP = frozenset({408, 425, 429})


def is_transient(status: str, http_status: int | None = None) -> bool:
    """Whether the same request may succeed later (what `--retry-failed` tries again)."""
    if status == "http_error":
        return http_status is not None and (http_status in _TRANSIENT_HTTP or 500 <= http_status <= 599)
    return status in _TRANSIENT
