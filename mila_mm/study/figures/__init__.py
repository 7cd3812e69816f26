"""The figures of the study: what is measured on a model, and how it is drawn."""
