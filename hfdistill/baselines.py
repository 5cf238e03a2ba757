"""What a student has to beat: linear models on word counts, and the majority class."""

from __future__ import annotations

import numpy as np


def tfidf_logistic_regression(train_texts: list[str], train_labels: list[int], texts: list[str], seed: int = 0) -> np.ndarray:
    """Predictions of logistic regression on TF-IDF of word 1-grams and 2-grams.

    Sublinear term frequency, C = 10; words must occur in two documents from 1,000 rows on, in one below.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    minimum = 2 if len(train_texts) >= 1000 else 1
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=minimum), LogisticRegression(C=10, max_iter=1000, random_state=seed)
    )
    return model.fit(train_texts, train_labels).predict(texts)


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

    frequent = np.bincount(references).argmax()
    majority = {"majority": score(np.full(len(references), frequent), references)}
    if len(set(data.labelled["label"])) < 2:
        return majority  # one class only: there is nothing to fit
    values = {"tfidf_logreg": fitted_on(data.labelled)}
    if len(data.transfer):
        values["tfidf_logreg_teacher_labels"] = fitted_on(data.teacher_train)
    return {**values, **majority}
