"""VQA accuracy, BLEU and the paired bootstrap; nothing is downloaded."""

import math
import random
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}


def normalize_answer(text: str) -> str:
    """Normalises an answer as the VQA evaluation does: lower case, no punctuation, no articles, number words as digits."""
    text = text.lower().strip().translate(str.maketrans("", "", string.punctuation))
    words = _ARTICLES.sub(" ", text).split()
    return " ".join(_NUMBERS.get(word, word) for word in words)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Scores each prediction in [0, 1].

    With three or more reference answers this is the VQA score (Antol et al. 2015): min(1, matches / 3), averaged over
    leaving out each annotator. With one or two, it is the exact match after normalisation.

    Raises:
        ValueError: the lists differ in length, or a question has no reference answer.
    """
    if len(predictions) != len(references) or any(not r for r in references):
        raise ValueError(
            f"Need one non-empty reference list per prediction, got {len(predictions)}, {len(references)}."
        )
    scores = []
    for prediction, answers in zip(predictions, references):
        answered = normalize_answer(prediction)
        hits = [answered == normalize_answer(answer) for answer in answers]
        if len(hits) < 3:
            scores.append(float(any(hits)))
        else:
            total = sum(hits)
            scores.append(sum(min(1.0, (total - hit) / 3) for hit in hits) / len(hits))
    return scores


def accuracy_by_type(scores: Sequence[float], types: Sequence[str]) -> dict[str, float]:
    """Returns the mean score of each question type, and of all questions as `all`."""
    groups: dict[str, list[float]] = {}
    for score, kind in zip(scores, types):
        groups.setdefault(kind, []).append(score)
    means = {kind: sum(values) / len(values) for kind, values in sorted(groups.items())}
    return means | {"all": sum(scores) / len(scores)}


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], max_order: int = 4, smooth: bool = False
) -> float:
    """Corpus BLEU in [0, 100] (Papineni et al. 2002); tokens are split at white space.

    Args:
        predictions: one text per row.
        references: accepted texts of each row.
        max_order: longest n-grams counted.
        smooth: add one to the matches and to the count of every order above 1, as BLEU+1 does (Lin & Och 2004, ORANGE;
            "add-k" with k = 1 in sacrebleu, `method2` in NLTK). Without smoothing, a corpus without any matching n-gram of
            `max_order` words gets 0, for example one of shorter texts.
    """
    matches, possible = [0] * max_order, [0] * max_order
    predicted_length = reference_length = 0
    for prediction, answers in zip(predictions, references, strict=True):
        predicted = prediction.split()
        accepted = [answer.split() for answer in answers]
        predicted_length += len(predicted)
        reference_length += min((abs(len(t) - len(predicted)), len(t)) for t in accepted)[1]
        for order in range(1, max_order + 1):
            best: Counter = Counter()
            for words in accepted:
                best |= _ngrams(words, order)
            matches[order - 1] += sum((_ngrams(predicted, order) & best).values())
            possible[order - 1] += max(0, len(predicted) - order + 1)
    if smooth:
        matches, possible = ([row[0], *(n + 1 for n in row[1:])] for row in (matches, possible))
    if min(matches) == 0:
        return 0.0
    precision = sum(math.log(m / p) for m, p in zip(matches, possible)) / max_order
    brevity = min(0.0, 1.0 - reference_length / max(predicted_length, 1))
    return 100.0 * math.exp(precision + brevity)


def _ngrams(words: Sequence[str], order: int) -> Counter:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], samples: int = 10000, seed: int = 0
) -> dict[str, float]:
    """Compares two models by their scores on the same questions with a paired bootstrap.

    Returns:
        difference: mean of `first` minus mean of `second`.
        low, high: 95 % interval of the difference.
        p_not_better: share of bootstrap samples in which `first` is not better than `second`.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"A paired bootstrap needs two non-empty lists of equal length, got {len(first)} and {len(second)}."
        )
    differences = [a - b for a, b in zip(first, second)]
    rng = random.Random(seed)
    size = len(differences)
    means = sorted(sum(rng.choices(differences, k=size)) / size for _ in range(samples))
    return {
        "difference": sum(differences) / size,
        "low": means[int(0.025 * samples)],
        "high": means[int(0.975 * samples) - 1],
        "p_not_better": sum(m <= 0 for m in means) / samples,
    }
