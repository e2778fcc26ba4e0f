"""A small byte-level tokenizer: the language of questions in whole words, everything that is read letter by letter."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .colours import COLOURS
from .figure_questions import FIGURE_WORDS
from .language import LANGUAGE
from .maps import MAP_WORDS
from .photos import CLASS_NAMES
from .pictures import PICTURE_WORDS
from .scenes import SHAPES
from .web import WEB_WORDS
from .words import HELD_OUT, LABEL_SETS, TRAIN_ITEMS, TRAIN_TITLES, TRAIN_WORDS

PAD_TOKEN, END_TOKEN = "<|endoftext|>", "</s>"
IMAGE_TOKEN, QUERY_TOKEN = "<image>", "<learnable>"
SPECIAL_TOKENS = (PAD_TOKEN, END_TOKEN, IMAGE_TOKEN, QUERY_TOKEN)
DEFAULT_SIZE = 1024


# words of the families that other programs draw, beside those of the project's own
FAMILY_WORDS = {
    "figures": FIGURE_WORDS,
    "web": WEB_WORDS,
    "pictures": PICTURE_WORDS,
    "maps": MAP_WORDS,
}


def language_words(families: Sequence[str] = ()) -> tuple[str, ...]:
    """Every word of questions, captions and closed answers, in a fixed order.

    Args:
        families: keys of FAMILY_WORDS whose words are added, but for those that images show to be read: these are
            spelled, wherever they stand.
    """
    labels = [label for words in LABEL_SETS for label in words if label.isalpha()]
    names = [*COLOURS, *SHAPES, *CLASS_NAMES, *labels]
    plurals = [f"{name}{'es' if name.endswith('s') else 's'}" for name in (*SHAPES, *CLASS_NAMES)]
    read = {*TRAIN_WORDS, *TRAIN_TITLES, *TRAIN_ITEMS, *HELD_OUT}
    added = [word for family in families for word in FAMILY_WORDS[family] if word not in read]
    return tuple(dict.fromkeys([*LANGUAGE, *names, *plurals, *added]))


def train_tokenizer(size: int = DEFAULT_SIZE, families: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Builds the tokenizer; the same on every machine.

    The vocabulary holds the special tokens, the 256 bytes, and the words of the question language with and without a
    leading space. There are no partial merges, so a word outside that language is always spelled in single letters:
    reading an unseen word takes no other pieces than reading a known one. Digits stand alone. Text is lower-cased.

    Args:
        size: the largest vocabulary allowed.
        families: as in `language_words`.

    Raises:
        ValueError: if the language does not fit.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    for word in language_words(families):
        for text in (f" {word}", word):
            pieces = [piece for piece, _ in byte_level.pre_tokenize_str(text)]
            assert len(pieces) == 1, f"{text!r} is not one word"
            tokens.append(pieces[0])
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    if len(vocabulary) > size:
        raise ValueError(f"The vocabulary needs {len(vocabulary)} tokens; size {size} is too small.")

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=[IMAGE_TOKEN, QUERY_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
