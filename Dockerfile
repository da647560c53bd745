# `vikdf serve` with the packaged checkpoint, from the wheel; see docs/serving.md. What follows the image's name is added
# to its options:
#     docker build -t vikdf .
#     docker run -p 8000:8000 -e VIKDF_API_KEY=secret vikdf --max-batch 8
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# another package index, such as PyTorch's own with its CPU builds; what PyPI has is built for CUDA, and 3 GB larger
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /opt/vikdf
ENV PATH=/opt/vikdf/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY requirements.txt requirements-backbones.txt ./
RUN pip install -c requirements.txt torch && pip install --no-deps -r requirements-backbones.txt
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels . && pip install -c requirements.txt "$(ls /wheels/*.whl)[default,serve]"

FROM ${BASE}
RUN useradd --create-home vikdf
COPY --from=build /opt/vikdf /opt/vikdf
ENV PATH=/opt/vikdf/bin:$PATH
USER vikdf
WORKDIR /home/vikdf
# unpacks the language model's weights, so that no container has to
RUN python -c "from modeling_vikdf.backbones import locate_backbone as find; find('HuggingFaceTB/SmolLM2-135M-Instruct')"
EXPOSE 8000
HEALTHCHECK --start-period=2m --timeout=10s \
    CMD python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=9)"
ENTRYPOINT ["vikdf", "serve", "--host", "0.0.0.0"]
