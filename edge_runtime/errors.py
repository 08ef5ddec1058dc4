"""Every error this package raises on purpose.

Each message is one sentence or two with three parts: what was found, what was expected, what to do about it.

    EdgeRuntimeError
    ├── ModelFileError          a model file is missing, damaged, ambiguous or does not fit its partner
    │   └── UnsupportedModelError   the file is sound but of another architecture or a type we cannot run
    ├── CheckpointError         a Hugging Face checkpoint cannot be converted
    ├── DownloadError           a model cannot be fetched, or what came is not what was announced
    │   └── StoreError              the disk does not take it
    ├── ImageError              a picture or document cannot be read, or is too large to be encoded
    │   └── VideoError              a video, or a frame of it, cannot be read, or is larger than was allowed
    ├── MessageError            a message, option or temporal id has the wrong form
    ├── RequestCancelled        the caller gave it up while pictures and videos were read
    ├── PromptTooLongError      the prompt does not fit into the context
    ├── CacheFull               the KV cache has no free cells, and nothing in it can be given up
    └── BackendUnavailable      a library or machine feature that is needed is not there
"""

from __future__ import annotations

JOIN_PARTS = "join the parts with llama.cpp's 'llama-gguf-split --merge FIRST_PART WHOLE'"
"""What to do with a model in several files."""


class EdgeRuntimeError(Exception):
    """Base of all errors of this package; its text is meant for the user."""


class ModelFileError(EdgeRuntimeError):
    """A model file is missing, damaged, ambiguous, or does not fit its partner."""


class UnsupportedModelError(ModelFileError):
    """A sound model file of an architecture or tensor type that this runtime does not run."""


class CheckpointError(EdgeRuntimeError):
    """A Hugging Face checkpoint that cannot be converted, or an output that must not be overwritten."""


class DownloadError(EdgeRuntimeError):
    """A model that cannot be fetched or stored, or that arrived other than it was announced."""


class StoreError(DownloadError):
    """A file of the model store that the disk does not take, or does not let go."""


class StoreFull(StoreError):  # noqa: N818 - says what is the matter
    """More than clients of a server may store."""


class AddressRefused(DownloadError):  # noqa: N818 - says what is the matter
    """A download that a client asked for, and that would lead where the owner lets none go."""


class ImageError(EdgeRuntimeError):
    """A picture or document that cannot be decoded, or that is too large to be encoded."""


class VideoError(ImageError):
    """A video, or a frame of it, that cannot be decoded, or that is larger than was allowed."""


class MessageError(EdgeRuntimeError):
    """A message, an option or a list of temporal ids that has the wrong form."""


class PromptTooLongError(EdgeRuntimeError):
    """A prompt that does not fit into the context window.

    Parameters
    ----------
    n_prompt, n_ctx : tokens of the prompt, and those that the context holds.
    """

    def __init__(self, message: str, n_prompt: int | None = None, n_ctx: int | None = None) -> None:
        super().__init__(message)
        self.n_prompt, self.n_ctx = n_prompt, n_ctx


class CacheFull(EdgeRuntimeError):  # noqa: N818 - says what is the matter
    """The KV cache has no free cells for what was to be computed; nothing has changed.

    The engine answers it by giving up idle prefixes and by preempting requests; callers see it when neither helps.

    Parameters
    ----------
    reason : what llama.cpp says of it, if anything.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(
            f"The KV cache is full{f' ({reason})' if reason else ''}; load the model with a larger --ctx."
        )


class EngineBusy(EdgeRuntimeError):  # noqa: N818 - says what is the matter, not that something broke
    """Too many requests are waiting; the same one may be made again later."""


class RequestCancelled(EdgeRuntimeError):  # noqa: N818 - says what happened, not that something broke
    """A request that was cancelled before there was an answer to end."""


class NotEnoughMemoryError(EdgeRuntimeError):
    """The model needs more memory than is free."""


class BackendUnavailable(EdgeRuntimeError):  # noqa: N818 - the name users see; "unavailable" says it is an error
    """A library or a machine feature that is needed is not there."""
