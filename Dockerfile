# The course in a container: docker build -t minipeft . && docker run -p 8888:8888 minipeft
# Your copy of the chapters is work/ in the container; to keep it on your disk add
# -v "$PWD/work:/course/work".
FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /course
COPY . .
RUN python setup_env.py
EXPOSE 8888
CMD [".venv/bin/python", "lab.py", "--ip=0.0.0.0", "--no-browser"]
