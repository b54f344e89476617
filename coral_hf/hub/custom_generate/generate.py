"""`target.generate(..., custom_generate="org/name", assistant_model=drafter, trust_remote_code=True)`."""


def generate(model, *args, assistant_model=None, **kwargs):
    """Generates with a CORAL drafter. Arguments are those of `generate`."""
    try:
        import coral_hf  # noqa: F401  (lets generate() use CORAL drafters)
    except ImportError as error:
        raise ImportError("CORAL drafters need the package: pip install coral-hf") from error
    return model.generate(*args, assistant_model=assistant_model, **kwargs)
