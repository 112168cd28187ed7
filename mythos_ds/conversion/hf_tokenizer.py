"""A sentencepiece tokenizer as tokenizer.json, with the same ids."""

from pathlib import Path
from shutil import copyfile

from mythos_ds.errors import CheckpointError
from mythos_ds.weights.model_folder import TOKENIZER

_NEVER = -1e6
"""Log-probability of pieces that no text gives, such as </s>."""
_SAMPLE = "def f(x):\n\t  return  x ** 2  # naïve “quotes” 漢字 🙂 \u2581 1234567\n\n"


def write_tokenizer(model: Path, output: Path) -> dict[str, int]:
    """tokenizer.json with the ids of the sentencepiece model, which is kept beside it; returns the special ids.

    Raises CheckpointError where a sample is not encoded alike.
    """
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = pieces.GetPieceSize()
    vocabulary = {pieces.IdToPiece(i): i for i in range(size)}
    scores = {pieces.IdToPiece(i): pieces.GetScore(i) for i in range(size)}
    plain = [p for p, i in vocabulary.items() if not (pieces.IsControl(i) or pieces.IsUnknown(i) or pieces.IsByte(i))]
    unknown = pieces.IdToPiece(pieces.unk_id())
    core: models.Model
    if any(score != int(score) for score in scores.values()):  # log-probabilities; those of BPE are minus a rank
        known = set(plain)
        ordered = [(p, scores[p] if p in known else _NEVER) for p in vocabulary]
        core = models.Unigram(ordered, pieces.unk_id(), byte_fallback=True)
    else:
        core = models.BPE(vocabulary, _merges(plain, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(core)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    if made.encode(_SAMPLE, add_special_tokens=False).ids != pieces.EncodeAsIds(_SAMPLE):
        raise CheckpointError(f"{model}: no tokenizer.json with the same ids could be made")
    special = {"unk_token": unknown, "eos_token": pieces.IdToPiece(pieces.eos_id())}
    ids = {"eos_token_id": pieces.eos_id()}
    for name in ("bos", "pad"):
        number = getattr(pieces, f"{name}_id")()
        if number >= 0:
            special[f"{name}_token"], ids[f"{name}_token_id"] = pieces.IdToPiece(number), number
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        split_special_tokens=True,  # "</s>" in a text is text, as in training
        **special,
    )
    fast.save_pretrained(str(output))
    copyfile(model, output / TOKENIZER)
    return ids


def _merges(pieces: list[str], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that make each piece of two others, in the order in which sentencepiece prefers them."""
    found = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in scores and b in scores]
        known.sort(key=lambda pair: (-scores[pair[0]], -scores[pair[1]]))
        found += [(-scores[piece], pair) for pair in known]
    found.sort(key=lambda entry: entry[0])
    return [pair for _, pair in found]
