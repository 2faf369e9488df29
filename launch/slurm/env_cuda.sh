# Sourced by the batch script before the ranks start: nodes with NVIDIA GPUs. Modules and network settings of your site
# belong here; what is set already stays.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
