# Sourced by the batch script before the ranks start: nodes with MetaX GPUs. Never run on that hardware. torch and Triton
# for MACA find their SDK by MACA_PATH and by LD_LIBRARY_PATH; what is set already stays.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export MACA_PATH=${MACA_PATH:-/opt/maca}
export PATH=$MACA_PATH/bin:$MACA_PATH/mxgpu_llvm/bin:$PATH
export LD_LIBRARY_PATH=$MACA_PATH/lib:$MACA_PATH/mxgpu_llvm/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ ! -d "$MACA_PATH" ]; then
    echo "env_maca.sh: MACA_PATH=$MACA_PATH is no folder; set it to that of the MACA SDK" >&2
    exit 2
fi
