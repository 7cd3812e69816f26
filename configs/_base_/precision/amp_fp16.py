# Mixed precision in fp16 with dynamic loss scaling, for GPUs without bf16: as --amp --amp-dtype fp16.
amp = 'fp16'
