/* A stand-in for pyxis: gives srun the options --container-image, --container-mounts,
 * --container-workdir and --container-env, and runs the task in a root of its own: the image (a
 * squashfs file) laid over the host's root, so that the host's programs stay there. What is mounted
 * is in container.sh beside the plugin's source; this file only enters the namespace and the root.
 * Not proof of what the real pyxis does with a real image. */
#define _GNU_SOURCE
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis_stand_in, 1)

enum { IMAGE, MOUNTS, WORKDIR, ENV, COUNT };
static char *given[COUNT];

static int take(int which, const char *text, int remote) {
  (void)remote;
  free(given[which]);
  given[which] = text ? strdup(text) : NULL;
  return 0;
}

static struct spank_option options[] = {
    {"container-image", "FILE", "image to run in", 1, IMAGE, take},
    {"container-mounts", "SRC:DST,...", "what else to mount", 1, MOUNTS, take},
    {"container-workdir", "DIR", "working directory", 1, WORKDIR, take},
    {"container-env", "NAME,...", "variables that the image must not replace", 1, ENV, take},
    SPANK_OPTIONS_TABLE_END};

int slurm_spank_init(spank_t spank, int count, char **words) {
  (void)count, (void)words;
  for (struct spank_option *option = options; option->name; option++)
    if (spank_option_register(spank, option) != ESPANK_SUCCESS) return -1;
  return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char **words) {
  char root[64], command[9000];
  if (!given[IMAGE]) return 0;
  if (count < 1 || unshare(CLONE_NEWNS)) return -1;
  snprintf(root, sizeof root, "/tmp/.rig-root.%d", (int)getpid());
  setenv("RIG_IMAGE", given[IMAGE], 1);
  setenv("RIG_MOUNTS", given[MOUNTS] ? given[MOUNTS] : "", 1);
  setenv("RIG_ROOT", root, 1);
  snprintf(command, sizeof command, "sh '%s'", words[0]);
  if (system(command)) {
    slurm_error("pyxis: cannot start a container from %s", given[IMAGE]);
    return -1;
  }
  if (chroot(strcat(root, "/root"))) return -1;
  if (chdir(given[WORKDIR] ? given[WORKDIR] : "/")) {
    slurm_error("pyxis: no directory %s in the container", given[WORKDIR]);
    return -1;
  }
  /* An image with an opinion: its HF_TOKEN and RIG_OPINION stand, unless --container-env names
   * them. */
  const char *kept = given[ENV] ? given[ENV] : "";
  if (!strstr(kept, "HF_TOKEN")) spank_setenv(spank, "HF_TOKEN", "from-the-image", 1);
  if (!strstr(kept, "RIG_OPINION")) spank_setenv(spank, "RIG_OPINION", "from-the-image", 1);
  return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **words) {
  (void)spank, (void)count, (void)words;
  return given[IMAGE] ? chdir(given[WORKDIR] ? given[WORKDIR] : "/") : 0;
}
