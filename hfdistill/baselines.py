"""What a student has to beat: linear models and cosines of word counts, the majority class, and chance."""

from __future__ import annotations

import numpy as np

from .data.image_files import pixels_of
from .metrics.embeddings import retrieval_metrics, similarity_metrics


def tfidf_logistic_regression(train_texts: list[str], train_labels: list[int], texts: list[str], seed: int = 0) -> np.ndarray:
    """Predictions of logistic regression on TF-IDF of word 1-grams and 2-grams.

    Sublinear term frequency, C = 10; words must occur in two documents from 1,000 rows on, in one below. With rows of zeros
    and ones for labels, one regression for each label.
    """
    import warnings

    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    minimum = 2 if len(train_texts) >= 1000 else 1
    classifier = LogisticRegression(C=10, max_iter=1000, random_state=seed)
    if np.ndim(train_labels) == 2:
        classifier = OneVsRestClassifier(classifier)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=minimum), classifier)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")  # as can be with few labels
        return model.fit(train_texts, np.asarray(train_labels)).predict(texts)


def window_logistic_regression(train_rows: list, train_labels: list, rows: list, seed: int = 0) -> list[np.ndarray]:
    """Label ids for each word of `rows` by logistic regression on the word, its two neighbours on each side, and its bigram. C = 10.

    Args:
        train_rows, rows: lists of words.
        train_labels: a label id for each word of `train_rows`; words with -100 are not learnt from.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labels = np.concatenate([np.asarray(own) for own in train_labels])
    known = labels != -100
    features = [own for own, keep in zip(_windows(train_rows), known) if keep]
    model = make_pipeline(DictVectorizer(), LogisticRegression(C=10, max_iter=200, random_state=seed)).fit(features, labels[known])
    return np.split(model.predict(_windows(rows)), np.cumsum([len(row) for row in rows])[:-1])


def _windows(rows: list) -> list[dict[str, int]]:
    features = []
    for row in rows:
        padded = ["", "", *(word.lower() for word in row), "", ""]
        for i in range(2, len(padded) - 2):
            own = {f"{offset} {padded[i + offset]}": 1 for offset in range(-2, 3)}
            features.append(own | {f"01 {padded[i]} {padded[i + 1]}": 1})
    return features


def majority_share(labels) -> float:
    """Accuracy of always giving the most frequent label of `labels`; missing labels (-100) do not count.

    Example:
        >>> majority_share([0, 1, 1, 2, -100])
        0.5
    """
    labels = np.asarray(labels)
    _, counts = np.unique(labels[labels != -100], return_counts=True)
    return float(counts.max() / counts.sum())


def linear_baselines(data, score) -> dict[str, float]:
    """TF-IDF + logistic regression on the student's labels and on the teacher's, and the majority class, on the held-out split.

    Args:
        data ([`TextData`]): a classification task.
        score: `(predictions, references) -> float`, the metric of the table.
    """
    test = next(iter(data.evaluation.values()))
    references = test["label"][:]

    def texts(split) -> list[str]:
        return [" ".join(row) for row in zip(*(split[column] for column in data.text_columns))]

    def fitted_on(split) -> float:
        return score(tfidf_logistic_regression(texts(split), split["label"][:], texts(test)), references)

    if data.is_multi_label:
        references = np.asarray(references).astype(int)
        frequent = (references.mean(0) > 0.5).astype(int)
        majority = {"majority": score(np.tile(frequent, (len(references), 1)), references)}
    else:
        majority = {"majority": score(np.full(len(references), np.bincount(references).argmax()), references)}
        if len(set(data.labelled["label"])) < 2:
            return majority  # one class only: there is nothing to fit
    values = {"tfidf_logreg": fitted_on(data.labelled)}
    if len(data.transfer):
        values["tfidf_logreg_teacher_labels"] = fitted_on(data.teacher_train)
    return {**values, **majority}


def window_baselines(data, score) -> dict[str, float]:
    """`window_logistic_regression` on the student's labels and on the teacher's, and the majority class, on the held-out split.

    Args:
        data ([`TokenData`]): a token classification task.
        score: `(predictions, references) -> float` on rows of label ids, the metric of the table.
    """
    test = next(iter(data.evaluation.values()))
    references = test["label"][:]
    every = np.concatenate([np.asarray(row) for row in references])
    frequent = np.bincount(every[every != -100]).argmax()
    majority = {"majority": score([np.full(len(row), frequent) for row in references], references)}

    def fitted_on(split) -> float:
        return score(window_logistic_regression(split[data.words][:], split["label"][:], test[data.words][:]), references)

    if len({label for row in data.labelled["label"] for label in row} - {-100}) < 2:
        return majority  # one label only: there is nothing to fit
    values = {"window_logreg": fitted_on(data.labelled)}
    if len(data.transfer):
        values["window_logreg_teacher_labels"] = fitted_on(data.teacher_train)
    return {**values, **majority}


def pair_baselines(data, metric: str) -> dict[str, float]:
    """What sentence embeddings must beat on the first held-out split: cosine of TF-IDF vectors of words, and random order.

    Inverse document frequencies come from the training texts, of which no labels are needed; sublinear term frequency; words that
    the training texts lack do not count. "chance" is the expected value where the documents are in random order, 0 for correlation.

    Args:
        data ([`TextPairs`]): pairs with or without scores.
        metric: a key of [`score_embeddings`].
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    test = next(iter(data.evaluation.values()))
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit(data.transfer["text"])
    queries, documents = (vectorizer.transform(test[column][:]) for column in ("query", "document"))
    if "score" in test.column_names:
        values = similarity_metrics(np.asarray(queries.multiply(documents).sum(1)).ravel(), test["score"][:])
    else:
        values = retrieval_metrics((queries @ documents.T).toarray())
    return {"tfidf_cosine": values[metric], "chance": chance_level(metric, len(test))}


def chance_level(metric: str, documents: int) -> float:
    """Expected value of a metric of [`score_embeddings`] where all documents are in random order.

    Example:
        >>> chance_level("recall_at_10", 400), chance_level("spearmanr", 400)
        (0.025, 0.0)
    """
    kind, _, cutoff = metric.rpartition("_at_")
    if not kind:
        return 0.0
    ranks = range(1, min(int(cutoff), documents) + 1)
    return sum(1 / rank if kind == "mrr" else 1 for rank in ranks) / documents


def pixel_baselines(data) -> dict[str, float]:
    """Accuracy of logistic regression on pixels with the student's labels and with the teacher's, and of the majority class.

    Args:
        data ([`ImageData`]): images that all have one size.
    """
    from sklearn.linear_model import LogisticRegression

    test = next(iter(data.evaluation.values()))

    def table(split) -> tuple[np.ndarray, np.ndarray]:
        return pixels_of(split), np.asarray(split["label"])

    pixels, truth = table(test)

    def fitted_on(split) -> float:
        return float((LogisticRegression(max_iter=2000).fit(*table(split)).predict(pixels) == truth).mean())

    values = {"pixel_logreg": fitted_on(data.labelled)}
    if len(data.transfer):
        values["pixel_logreg_teacher_labels"] = fitted_on(data.teacher_train)
    return {**values, "majority": majority_share(truth)}
