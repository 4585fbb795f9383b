# shellcheck shell=bash disable=SC2034  # used by job.sh and megaarch submit
# This cluster, in one file: copy it to launch/site.sh and fill it in. It is sourced where jobs are
# submitted (megaarch submit does so; before an sbatch by hand: source launch/site.sh) and inside
# every job: no exit, and a last command that succeeds.

# --- where jobs are submitted: variables that sbatch reads (man sbatch, INPUT ENVIRONMENT VARIABLES)
export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my-project
#export SBATCH_QOS=normal
#export SBATCH_CONSTRAINT=h100
CPU_PARTITION=cpu  # for jobs without GPUs: data, conversion, reports; empty: the partition above
CPU_SBATCH_OPTIONS=()  # more for megaarch submit's jobs there, where QOS and CONSTRAINT do not count

# --- the nodes that train
GPUS_PER_NODE=8                # 0 on a cluster without GPUs
RANKS_PER_NODE=$GPUS_PER_NODE  # processes of a full node, one a GPU; on CPUs as many as you like
CPUS_PER_RANK=8
WARNING_SECONDS=300  # ahead of its time limit a study's job is told to save; more for a large model
MAX_LOSSES=3  # times in a row that a job continues by itself without a checkpoint in between: a rank
              # died or hung, the network or a GPU failed, or it was told to stop before its first step
SRUN_OPTIONS=()  # more for the ranks' srun, e.g. (--cpu-bind=map_cpu:...) or (--container-image=...)

# --- inside jobs: the environment, from modules, a virtual environment or a container
#module load cuda/13.0
#source .venv/bin/activate
CONTAINER=()  # ahead of every command, e.g. (apptainer exec --nv /images/megaarch.sif)
MPI=(mpiexec)  # how MPI programs start here; or e.g. (srun --mpi=pmix), see srun --mpi=list

# --- the network; values hang on the machine
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5
#export GLOO_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=1
