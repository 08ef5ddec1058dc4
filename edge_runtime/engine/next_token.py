"""Turn logits into the next token of an answer or the next step of a beam search, and decide whether it was the last.

Input: a task whose prompt is computed, and the rows with its logits. Output: events for its reader, keys for the
next step, and the finish reason once it has ended. Knows nothing of other tasks.
"""

from __future__ import annotations

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.engine.drafting import END
from edge_runtime.engine.events import FinishReason
from edge_runtime.engine.task import Decoding, Task, TaskState
from edge_runtime.errors import ModelFileError
from edge_runtime.generation.sampling import Sampler, is_finite
from edge_runtime.inputs.messages import THINK_END
from edge_runtime.prompt.tokenizer import Tokenizer


def advance(task: Task, rows: list[int], decoder: Decoder, tokenizer: Tokenizer) -> FinishReason | None:
    """Choose the next token from a task's logits, for its answer or for every beam.

    Parameters
    ----------
    rows : rows of the last step: one, one per beam once there are several, or one more than guesses were checked.

    Returns
    -------
    reason : why the answer ended; None if it has not.

    Raises
    ------
    ModelFileError
        When the first logits are not finite.
    """
    if task.state is TaskState.PREFILL:
        task.enter(TaskState.DECODING)
    decoding = task.decoding
    if decoding is None:
        if not is_finite(decoder.logits_view(rows[0])):
            raise ModelFileError(
                "The decoder computes values that are not finite; its file is damaged: download or convert it again."
            )
        decoding = task.start_decoding(tokenizer, decoder)
    return (
        _search(task, decoding, rows, decoder, tokenizer)
        if task.request.options.n_beams > 1
        else _sample_rows(task, decoding, rows, decoder, tokenizer)
    )


def _search(
    task: Task, decoding: Decoding, rows: list[int], decoder: Decoder, tokenizer: Tokenizer
) -> FinishReason | None:
    if decoding.beams is None:
        decoding.beams = task.start_search(decoder, tokenizer.stop_ids)
    decoding.beams.advance(rows)
    task.count_token()
    return finish_beam_search(task, tokenizer) if decoding.beams.search.is_done else None


def finish_beam_search(task: Task, tokenizer: Tokenizer) -> FinishReason:
    """Send the answer that a beam search found; returns the finish reason."""
    assert task.beams is not None
    return task.put_beam(task.beams.search.best, tokenizer.stop_ids)


def _sample_rows(
    task: Task, decoding: Decoding, rows: list[int], decoder: Decoder, tokenizer: Tokenizer
) -> FinishReason | None:
    """Sample from row after row as long as what comes out was guessed; positions of wrong guesses are cut off."""
    before, draft, reason = len(task.keys), [], None
    if decoding.drafting is not None:
        draft = decoding.drafting.at_work.tokens
    right = 0
    try:
        for row, guessed in zip(rows, [*draft, None], strict=True):
            reason = _sample(task, decoding, row, decoder, tokenizer)
            if reason is not None or task.keys[-1] != guessed:
                break
            right += 1
    finally:
        if draft:
            decoder.rewind(task.sequence, before + right)
        if decoding.drafting is not None:
            said = task.keys[before:]
            decoding.drafting.settle(said if len(said) > right else [*said, END])
    return reason


def _sample(task: Task, decoding: Decoding, row: int, decoder: Decoder, tokenizer: Tokenizer) -> FinishReason | None:
    stream, rules = decoding.stream, task.request.rules
    token_id = _next_token(task, decoding, row, decoder, tokenizer)
    task.count_token()
    reason: FinishReason | None = None
    if token_id in tokenizer.stop_ids or (rules is not None and token_id in rules.stop_ids):
        reason, decoding.end_score = "stop", task.score(decoder, row, token_id)
    else:
        for piece in stream.feed(token_id, task.score(decoder, row, token_id)):
            task.events.put(piece)
        task.keys.append(token_id)
        if stream.stopped or (decoding.constraint is not None and decoding.constraint.ended):
            reason = "stop"
        elif task.request.options.repetition_check and _repeats(decoding, token_id):
            reason = "repetition"
        elif task.n_tokens >= task.request.options.max_tokens or len(task.keys) >= decoder.n_ctx:
            reason = "length"
    if reason:
        for piece in stream.finish():
            task.events.put(piece)
    return reason


def _repeats(decoding: Decoding, token_id: int) -> bool:
    """Whether to end an answer because it repeats itself; one with a form may repeat, the form ends it."""
    if decoding.constraint is None:
        return decoding.repetition.feed(token_id)
    if decoding.stream.is_reasoning and decoding.repetition.feed(token_id):
        decoding.must_answer = True
    return False


def _next_token(task: Task, decoding: Decoding, row: int, decoder: Decoder, tokenizer: Tokenizer) -> int:
    """Sample a token, or end reasoning that has used up its budget."""
    sampler, constraint = decoding.sampler, decoding.constraint
    assert sampler is not None
    budget, think_end = task.request.options.thinking_budget, tokenizer.special_ids.get(THINK_END)
    if think_end is not None and decoding.stream.is_reasoning:
        is_over = decoding.must_answer or (budget is not None and task.n_tokens >= budget)
        token_id = think_end if is_over else _free_token(task, sampler, row, decoder, tokenizer)
        if constraint is not None and token_id in tokenizer.stop_ids:
            token_id = think_end  # without an answer, the form would be violated
        if is_over:
            sampler.accept(token_id)
        return token_id
    if constraint is None:
        return _free_token(task, sampler, row, decoder, tokenizer)
    logits = decoder.logits(row)
    n_left = min(task.request.options.max_tokens - task.n_tokens, decoder.n_ctx - len(task.keys))
    token_id = constraint.next_token(n_left, lambda ids: sampler.choose(ids, logits))
    sampler.accept(token_id)
    return token_id


def _free_token(task: Task, sampler: Sampler, row: int, decoder: Decoder, tokenizer: Tokenizer) -> int:
    """Sample from all tokens, or from those that the request's rules allow."""
    rules = task.request.rules
    ids = None if rules is None else rules.candidates(task.n_tokens, decoder.config.vocabulary, tokenizer.stop_ids)
    if ids is None:
        return sampler.sample(decoder, row)
    token_id = sampler.choose(ids, decoder.logits(row))
    sampler.accept(token_id)
    return token_id
