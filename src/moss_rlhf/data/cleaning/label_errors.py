from moss_rlhf.data.cleaning.finding import Hit
def suspicious_labels(vectors, labels, *, folds, seed):
    return []
