"""Every error this package raises on purpose.

Each message is one or two sentences with three parts: what was found, what was expected, what to do about it.

    EdgeRuntimeError
    ├── ModelFileError          a model file is missing, damaged, ambiguous or does not fit its partner
    │   └── UnsupportedModelError   the file is sound but of another architecture or a type we cannot run
    ├── CheckpointError         a Hugging Face checkpoint cannot be converted
    ├── DownloadError           a model cannot be downloaded, or what arrived is not what was announced
    │   └── StoreError              the disk does not accept it
    ├── ImageError              a picture or document cannot be read, or is too large to be encoded
    │   └── VideoError              a video, or a frame of it, cannot be read, or is larger than allowed
    ├── MessageError            a message, option or temporal id has the wrong form
    ├── RequestCancelled        the caller cancelled while texts, pictures and videos were read
    ├── PromptTooLongError      the prompt does not fit into the context
    ├── EndpointError           a server that answers for us refuses, fails, is too slow or breaks off
    ├── CacheFull               the KV cache has no free cells, and nothing in it can be given up
    ├── BundleError             a bundle cannot be made of what is installed here
    └── BackendUnavailable      a required library or machine feature is missing
"""

from __future__ import annotations

JOIN_PARTS = "join the parts with llama.cpp's 'llama-gguf-split --merge FIRST_PART WHOLE'"
"""What to do with a model in several files."""


class EdgeRuntimeError(Exception):
    """Base of all errors of this package; its text is meant for the user."""


class ModelFileError(EdgeRuntimeError):
    """A model file is missing, damaged, ambiguous, or does not fit its partner."""


class UnsupportedModelError(ModelFileError):
    """An intact model file with an architecture or tensor type that this runtime does not run."""


class CheckpointError(EdgeRuntimeError):
    """A Hugging Face checkpoint that cannot be converted, or an output that must not be overwritten."""


class DownloadError(EdgeRuntimeError):
    """A model that cannot be downloaded or stored, or that differs from what was announced."""


class StoreError(DownloadError):
    """A file of the model store that cannot be written or deleted."""


class StoreFull(StoreError):  # noqa: N818 - the name says what is wrong
    """More than clients of a server may store."""


class AddressRefused(DownloadError):  # noqa: N818 - the name says what is wrong
    """A download that a client requested, from an address that the owner does not allow."""


class ImageError(EdgeRuntimeError):
    """A picture or document that cannot be decoded, or that is too large to be encoded."""


class VideoError(ImageError):
    """A video, or a frame of it, that cannot be decoded or is larger than allowed."""


class MessageError(EdgeRuntimeError):
    """A message, an option or a list of temporal ids that has the wrong form."""


class PromptTooLongError(EdgeRuntimeError):
    """A prompt that does not fit into the context window.

    Parameters
    ----------
    n_prompt, n_ctx : tokens in the prompt, at least, and in the context.
    """

    def __init__(self, message: str, n_prompt: int | None = None, n_ctx: int | None = None) -> None:
        super().__init__(message)
        self.n_prompt, self.n_ctx = n_prompt, n_ctx


class CacheFull(EdgeRuntimeError):  # noqa: N818 - the name says what is wrong
    """The KV cache has no free cells for new positions; nothing has changed.

    The engine responds by giving up idle prefixes and preempting requests; callers see it when neither helps.

    Parameters
    ----------
    reason : llama.cpp's message, if any.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(
            f"The KV cache is full{f' ({reason})' if reason else ''}; load the model with a larger --ctx."
        )


class EngineBusy(EdgeRuntimeError):  # noqa: N818 - the name says what is wrong; nothing broke
    """Too many requests are waiting; try again later."""


class EndpointError(EdgeRuntimeError):
    """A server that was asked for an answer refused, failed, was too slow, or broke off.

    Parameters
    ----------
    status : of HTTP; None when there was no reply.
    received : text of the answer that had arrived.
    may_pass : whether the same request may succeed later.
    """

    def __init__(
        self, message: str, *, status: int | None = None, received: str = "", may_pass: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.received, self.may_pass = status, received, may_pass


class RequestCancelled(EdgeRuntimeError):  # noqa: N818 - the name says what happened; nothing broke
    """A request that was cancelled before its answer started."""


class NotEnoughMemoryError(EdgeRuntimeError):
    """The model needs more memory than is free."""


class BundleError(EdgeRuntimeError):
    """An offline bundle that cannot be made of what is installed here, or of the wheels that were given."""


class BackendUnavailable(EdgeRuntimeError):  # noqa: N818 - the name users see; "unavailable" says it is an error
    """A required library or machine feature is missing."""
