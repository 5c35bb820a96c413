"""Building, verifying and reading WebDataset shards; needs no torch for the first two.

build, build_textures, demo ─► OUT/<category>/{train,test}-000000.tar + manifest.json ─► verify, Dataset
"""
