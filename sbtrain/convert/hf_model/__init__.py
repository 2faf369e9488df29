"""Files that an export carries along for transformers (trust_remote_code); they import nothing of ours."""
