"""Many models as one dataset: image datasets, trained populations, the zoo format, import and export."""
