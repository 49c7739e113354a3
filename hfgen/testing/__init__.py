"""The conformance kit: one check per behaviour a kind promises. A card is tested because it exists.

`pytest --pyargs hfgen.testing --hfgen-plugin NAME` runs it over one installed method, without the option over all.
"""
