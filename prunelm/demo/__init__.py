"""What `prunelm demo` runs on: small trained models, spoken sentences and text (see NOTICE)."""
