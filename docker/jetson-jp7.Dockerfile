# Compiles and measures kits on a Jetson with JetPack 7 (Thor; Orin from 7.2). On the Jetson, from the root of the
# repository:
#   docker build -f docker/jetson-jp7.Dockerfile -t edgesam-deploy:jetson-jp7 .
# JetPack 7 runs NVIDIA's common Arm images; for a newer TensorRT give a newer one, which an engine is then tied to:
#   --build-arg BASE_IMAGE=nvcr.io/nvidia/tensorrt:YY.MM-py3
# No PyTorch and no ONNX tools: kits come from `sam-export build --target` on a host.
ARG BASE_IMAGE=nvcr.io/nvidia/tensorrt:26.02-py3

FROM ${BASE_IMAGE} AS build
# Where pip looks besides its default index.
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
        python3 -m pip --python /opt/venv/bin/python install --no-cache-dir . \
    && /opt/venv/bin/python -c "import importlib.util as u; u.find_spec('tensorrt') or exit('BASE_IMAGE has no tensorrt')"

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="edgesam-deploy, JetPack 7" \
    org.opencontainers.image.description="Compiles, verifies and measures Segment-Anything engines on Jetson Thor and Orin" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.revision="${REVISION}"
# The GPU's device files belong to the group video.
RUN useradd --uid 10001 --no-create-home --home-dir /work --shell /usr/sbin/nologin --groups video edgesam \
    && install -d -m 1777 /kits /results /work
COPY --from=build /opt/venv /opt/venv
COPY benchmarks/collect.py /opt/edgesam-deploy/benchmarks/
COPY docker/bench.sh /opt/edgesam-deploy/docker/
# Any user may run it (--user): name and home do not come from /etc/passwd.
ENV HOME=/work \
    USER=edgesam \
    PATH=/opt/venv/bin:$PATH \
    EDGESAM_IMAGE="docker/jetson-jp7.Dockerfile on ${BASE_IMAGE}" \
    EDGESAM_REVISION=${REVISION} \
    BENCH_KITS=/kits \
    BENCH_WORK=/work
# Without a group of its own here, so that the group video counts.
USER 10001
WORKDIR /work
ENTRYPOINT ["/opt/edgesam-deploy/docker/bench.sh"]
