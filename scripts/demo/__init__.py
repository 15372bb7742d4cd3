"""Made-up corpora: the grammars that draw sentences, and the data sets of them."""
