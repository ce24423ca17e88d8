"""The theory applied to a layer of one's own: from weights, tokens and labelled examples to what it recommends."""
