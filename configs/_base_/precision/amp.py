# Mixed precision: bf16 where the GPU has it, else fp16 with dynamic loss scaling; as --amp on the command line.
amp = 'auto'
