# For clusters: NVIDIA's PyTorch, whose torch, NCCL and CUDA are kept, and the locked versions of everything else.
#   docker build -t mythos_ds .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data -v /runs:/runs mythos_ds \
#     pretrain --processes 8 --config tiny.json --run-dir /runs/tiny data.data_dir=/data
# Another base: --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3, with a torch that pyproject.toml allows.
# Keys (WANDB_API_KEY, HF_TOKEN) are given when a container starts, never here.
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The base holds pip to its own versions of libraries that the lock names in others.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/mythos_ds
COPY requirements.lock ./
# --no-deps: nothing asks for a torch of its own; the lock is whole, and names none.
RUN python3 -c "from importlib.metadata import version; print(version('torch'))" > /opt/torch-version \
    && python3 -m pip install --no-cache-dir --no-deps -r requirements.lock
COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python3 -c "from importlib.metadata import version; import sys; sys.exit(version('torch') != open('/opt/torch-version').read().strip() and 'another torch was installed')"

# Kernels are compiled on first use, into the user's own folder.
RUN useradd --create-home --uid 10001 --shell /bin/bash trainer
USER 10001
ENV TORCH_EXTENSIONS_DIR=/home/trainer/.cache/torch_extensions
WORKDIR /home/trainer
ENTRYPOINT ["mythos-ds"]
CMD ["--help"]
