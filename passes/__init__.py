"""One file per pass or matcher of the FFN fusion pipeline."""
