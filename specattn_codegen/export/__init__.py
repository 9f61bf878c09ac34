"""Export: tuned kernels as a folder that needs torch and triton only, or a repository for Hugging Face `kernels`."""
