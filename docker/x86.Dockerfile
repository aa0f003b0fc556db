# Builds, compiles and measures bundles on x86 with an NVIDIA GPU. From the root of the repository:
#   docker build -f docker/x86.Dockerfile -t edgesam-deploy:x86 .
# The base brings CUDA 13 and TensorRT; for drivers that only know CUDA 12:
#   --build-arg BASE_IMAGE=nvcr.io/nvidia/tensorrt:25.06-py3
ARG BASE_IMAGE=nvcr.io/nvidia/tensorrt:26.02-py3

FROM ${BASE_IMAGE} AS build
# Where pip looks besides its default index. PyTorch only exports the model: its CPU builds do, and are 4 GB smaller.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /src
COPY LICENSE NOTICE README.md pyproject.toml ./
COPY docker/constraints.txt docker/
COPY engines engines
COPY export export
COPY edgesam_deploy edgesam_deploy
# TensorRT's Python bindings are the base's own. The build dependencies obey the constraints too: through
# PIP_CONSTRAINT before pip 25.3, PIP_BUILD_CONSTRAINT since.
RUN python3 -m venv --system-site-packages --without-pip /opt/venv \
    && PIP_CONSTRAINT=docker/constraints.txt PIP_BUILD_CONSTRAINT=docker/constraints.txt \
        python3 -m pip --python /opt/venv/bin/python install --no-cache-dir '.[export]' nvidia-ml-py==13.615.71 \
    && /opt/venv/bin/python -c "import importlib.util as u; u.find_spec('tensorrt') or exit('BASE_IMAGE has no tensorrt')"

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="edgesam-deploy, x86 GPU" \
    org.opencontainers.image.description="Builds, compiles and measures Segment-Anything engines on x86 GPUs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 10001 --no-create-home --home-dir /work --shell /usr/sbin/nologin edgesam \
    && install -d -m 1777 /kits /results /work
COPY --from=build /opt/venv /opt/venv
COPY benchmarks/collect.py /opt/edgesam-deploy/benchmarks/
COPY docker/bench.sh /opt/edgesam-deploy/docker/
# Any user may run it (--user): name and home do not come from /etc/passwd.
ENV HOME=/work \
    USER=edgesam \
    PATH=/opt/venv/bin:$PATH \
    EDGESAM_CACHE=/work/cache \
    EDGESAM_IMAGE="docker/x86.Dockerfile on ${BASE_IMAGE}" \
    EDGESAM_REVISION=${REVISION} \
    ORT_DISABLE_TELEMETRY=1 \
    BENCH_TARGET=x86-gpu \
    BENCH_PRECISIONS="fp32 fp16 int8" \
    BENCH_WORK=/work
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["/opt/edgesam-deploy/docker/bench.sh"]
