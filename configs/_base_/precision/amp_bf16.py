# Mixed precision in bf16, one more part for the _base_ of a config: as --amp-dtype bf16 on the command line.
amp = 'bf16'
