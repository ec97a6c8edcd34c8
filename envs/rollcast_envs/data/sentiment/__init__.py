"""Short texts that twenty readers found positive or negative, from VADER (MIT; see SOURCE.md).

The folder holds the data and what built them; the classification task asks for the sentiment.
"""
