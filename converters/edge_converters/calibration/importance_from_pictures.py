"""Pictures and texts → an importance matrix for the decoder's quantizer: `edge-runtime convert --calibrate`.

The decoder runs in the types of the intermediate file over questions about the pictures, and over the texts.
llama.cpp calls back after every product; for each matrix of the layers the squares of its input columns are summed
over all positions, visual tokens included. llama-imatrix does the same with text alone.

llama.cpp's tensors are read in place, so their layout is declared here, and checked by each tensor's name.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from edge_converters.calibration.importance import Importance
from edge_converters.calibration.smoothing import SUFFIXES as PICTURE_SUFFIXES
from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.errors import BackendUnavailable, CheckpointError, ImageError
from edge_runtime.options import PromptOptions
from edge_runtime.pipeline import InputFormat, prepare
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.system.text_files import decode_text
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.gguf_file import Float32, GGUFFile

if TYPE_CHECKING:
    from edge_converters.plan.recipes import Progress

TEXT_SUFFIXES = (".txt", ".md")
MAX_TOKENS = 8192  # of all prompts; mean squares settle within a few thousand
PROMPT_TOKENS = 1024  # of one prompt at most
CALL_TOKENS = 256  # each with a row of logits, or llama.cpp skips rows in the last layer: 155 MB at full size
QUESTIONS = (
    "What is in the picture?",
    "Read all the text in the image, line by line.",
    "请详细描述这张图片。",
    "How many people are there, and what are they doing?",
    "Summarise the document in three sentences.",
    "图中的文字是什么？",
    'Answer in JSON: {"title": ..., "date": ..., "total": ...}',
    "Which of the objects is the largest, and where is it?",
)
MATRICES = "blk."  # llama-imatrix skips head and embedding, too
MAX_DIMS, MAX_SOURCES, NAME_BYTES, OP_PARAM_INTS = 4, 10, 64, 16


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor`, up to its name."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * MAX_DIMS),
    ("nb", ctypes.c_size_t * MAX_DIMS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * OP_PARAM_INTS),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * MAX_SOURCES),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * NAME_BYTES),
]


def observe(decoder: Path, mmproj: Path, folder: Path, progress: Progress) -> Importance:
    """Compute an importance matrix.

    Parameters
    ----------
    decoder : float file of the decoder.
    mmproj : vision file, of any type.
    folder : pictures and texts (.txt, .md) like those the model will be asked about.
    progress : called with ("observe", tokens done, tokens in all).

    Raises
    ------
    CheckpointError
        When the folder holds neither.
    """
    with Observer(decoder) as observer:
        streams = list(prompts(observer.file, mmproj, folder))
        total, done = sum(map(len, streams)), 0
        for stream in streams:
            progress("observe", done, total)
            observer.feed(stream)
            done += len(stream)
        progress("observe", done, total)
        return Importance(observer.means(), folder.resolve().name, n_chunks=len(streams))


def prompts(decoder: GGUFFile, mmproj: Path, folder: Path) -> Iterator[Float32]:
    """Yield embeddings of prompts, pictures and texts in turn: ndarray [shape=(n, hidden), float32] each."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES]
    texts = [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES]
    tokenizer = Tokenizer(decoder)
    streams = (
        _about_pictures(decoder, tokenizer, ImageEncoder(mmproj, exact=True), pictures) if pictures else iter(()),
        _of_texts(decoder, tokenizer, texts),
    )
    left = MAX_TOKENS
    for stream in (stream for pair in zip_longest(*streams) for stream in pair if stream is not None):
        if left > 0:
            yield stream[:left]
            left -= len(stream)
    if left == MAX_TOKENS:
        raise CheckpointError(
            f"{folder} holds no picture and no text that can be read; put some like those the model will see into it."
        )


def _about_pictures(
    decoder: GGUFFile, tokenizer: Tokenizer, encoder: ImageEncoder, pictures: Sequence[Path]
) -> Iterator[Float32]:
    template = decoder.get("tokenizer.chat_template", str, OFFICIAL_CHAT_TEMPLATE)
    form = InputFormat(encoder.slicing, tokenizer, encoder.n_queries, template)
    for number, picture in enumerate(pictures):
        message = {"role": "user", "content": [picture, QUESTIONS[number % len(QUESTIONS)]]}
        try:
            prepared = prepare([message], PromptOptions(), form)
        except ImageError:
            continue
        rows = np.array(decoder.rows("token_embd.weight", np.asarray(prepared.prompt.ids, np.int64)))
        for (first, end), tokens in zip(prepared.prompt.bounds, encoder.encode(prepared.groups), strict=True):
            rows[first:end] = tokens
        yield rows[:PROMPT_TOKENS]


def _of_texts(decoder: GGUFFile, tokenizer: Tokenizer, texts: Sequence[Path]) -> Iterator[Float32]:
    for path in texts:
        try:
            ids = tokenizer.encode(_text(path.read_bytes()))
        except OSError:
            continue
        for start in range(0, len(ids), PROMPT_TOKENS):
            yield decoder.rows("token_embd.weight", np.asarray(ids[start : start + PROMPT_TOKENS], np.int64))


def _text(raw: bytes) -> str:
    try:
        return decode_text(raw)
    except ValueError:  # another encoding: most of it is still text
        return raw.decode("utf-8", "replace")


class Observer:
    """A decoder in llama.cpp that sums the squares of its matrices' inputs.

    Raises
    ------
    CheckpointError
        When llama.cpp refuses the file.
    BackendUnavailable
        When llama.cpp's tensors have another layout than the one known here.
    """

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile(path)
        self._lib = lib = llama.library()
        self._op_name, self._name = llama.ggml_base().ggml_op_name, llama.ggml_base().ggml_get_name
        self._op_name.restype = self._name.restype = ctypes.c_char_p
        self._name.argtypes = [ctypes.c_void_p]
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}
        self._failure: BaseException | None = None
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False
        with llama.watch_log(lambda line: None):
            self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise CheckpointError(f"llama.cpp refuses its own input: {llama.last_errors()}; free some memory.")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = PROMPT_TOKENS, CALL_TOKENS, CALL_TOKENS
        options.n_outputs_max = CALL_TOKENS
        options.n_threads = options.n_threads_batch = psutil.cpu_count(logical=False) or 1
        self._callback = lib.ggml_backend_sched_eval_callback(self._on_tensor)
        options.cb_eval = self._callback
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            lib.llama_model_free(self._model)
            raise CheckpointError(f"llama.cpp cannot set up a context: {llama.last_errors()}; free some memory.")
        self._hidden = int(lib.llama_model_n_embd(self._model))
        self._batch = lib.llama_batch_init(CALL_TOKENS, self._hidden, 1)

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def feed(self, embeddings: Float32) -> None:
        """Run one prompt, at most `PROMPT_TOKENS` long.

        Parameters
        ----------
        embeddings : ndarray [shape=(n, hidden), float32]
        """
        lib, batch = self._lib, self._batch
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        for start in range(0, len(embeddings), CALL_TOKENS):
            chunk = np.ascontiguousarray(embeddings[start : start + CALL_TOKENS], np.float32)
            ctypes.memmove(batch.embd, chunk.ctypes.data, chunk.nbytes)
            batch.n_tokens = len(chunk)
            for i in range(len(chunk)):
                batch.pos[i], batch.n_seq_id[i], batch.logits[i] = start + i, 1, True
                batch.seq_id[i][0] = 0
            with llama.watch_log(lambda line: None):
                status = lib.llama_decode(self._context, batch)
            if self._failure is not None:
                raise self._failure
            if status != 0:
                raise CheckpointError(f"llama.cpp cannot run the decoder: {llama.last_errors()}; free some memory.")

    def means(self) -> dict[str, Float32]:
        """Mean squares by tensor name: ndarray [shape=(columns,), float32] each."""
        return {name: (sums / self._counts[name]).astype(np.float32) for name, sums in self._sums.items()}

    def _on_tensor(self, address: int, ask: bool, _data: Any) -> bool:
        """Say whether a result is of interest, or add its input; no exception may cross llama.cpp."""
        if self._failure is not None:
            return not ask  # nothing is of interest any more; stop the rest early
        try:
            tensor = _Tensor.from_address(address)
            if self._op_name(tensor.op) != b"MUL_MAT":
                return not ask
            weight, given = tensor.src[0].contents, tensor.src[1].contents
            name = weight.name.decode("utf-8", "replace")
            if not name.startswith(MATRICES):
                return not ask
            if not ask:
                self._take(name, weight, given)
        except BaseException as error:  # noqa: BLE001 - raised again after the call
            self._failure = error
        return True

    def _take(self, name: str, weight: _Tensor, given: _Tensor) -> None:
        columns, rows = given.ne[0], given.ne[1] * given.ne[2] * given.ne[3]
        size = ctypes.sizeof(ctypes.c_float)
        packed = all(stride == size * math.prod(given.ne[:axis]) for axis, stride in enumerate(given.nb))
        if self._name(ctypes.addressof(weight)) != name.encode() or not packed:
            raise BackendUnavailable(
                "The tensors of this llama.cpp lie in another way than in llama-cpp-python 0.3.36; install that "
                "version, or give an importance matrix with --imatrix."
            )
        values = np.ctypeslib.as_array(ctypes.cast(given.data, ctypes.POINTER(ctypes.c_float)), (rows, columns))
        squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        self._sums[name] = self._sums.get(name, 0) + squares
        self._counts[name] = self._counts.get(name, 0) + rows
