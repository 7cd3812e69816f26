# docker build -t mila_mm . && docker run --gpus all -it -v $PWD/data:/work/data -v $PWD/work_dirs:/work/work_dirs mila_mm
# torch's wheels bring CUDA's libraries; Triton's launcher compiles a few lines of C at the first start, for which the
# runtime image lacks gcc and Python's headers.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc git libglib2.0-0 \
 && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV

WORKDIR /opt/mila_mm
# The pins first: they change seldom, and torch is most of the image.
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt \
 && pip install --no-cache-dir --force-reinstall --no-deps "$(grep '^opencv-python-headless' requirements.txt)"
COPY . .
RUN pip install --no-cache-dir --no-deps . && mila --version

WORKDIR /work
CMD ["mila", "--help"]
