/* A disk that can be made to fail, and that records the calls that it received, in order (LD_PRELOAD).

   Files of the directory DISK_DIR are watched: the writes, truncations and syncs of the database, its log and the file
   of acknowledgements go to the journal DISK_JOURNAL; the shared memory (-shm) is memory, and not of the disk. The file
   DISK_FAULTS holds two ints, the errno that writes and that syncs fail with (0: they work). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct faults { int32_t write_errno, sync_errno; };
struct entry { uint32_t kind, name_size; uint64_t offset, size; };

static struct faults *faults;
static int journal = -1;
static const char *directory;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void start(void)
{
    static struct faults none;
    const char *path = getenv("DISK_FAULTS");
    directory = getenv("DISK_DIR");
    faults = &none;
    if (path) {
        int fd = REAL(open64)(path, O_RDWR);
        faults = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    if (getenv("DISK_JOURNAL"))
        journal = REAL(open64)(getenv("DISK_JOURNAL"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

/* The name of a watched file, or NULL. */
static const char *watched(int fd, char *buffer, size_t size)
{
    char link[64];
    size_t length = directory ? strlen(directory) : 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = length ? readlink(link, buffer, size - 1) : -1;
    if (got <= (ssize_t)length || strncmp(buffer, directory, length) != 0)
        return NULL;
    buffer[got] = 0;
    const char *name = buffer + length + 1;
    size_t n = strlen(name);
    return n > 4 && strcmp(name + n - 4, "-shm") == 0 ? NULL : name;
}

static void record(char kind, const char *name, uint64_t offset, const void *data, uint64_t size)
{
    if (journal < 0)
        return;
    struct entry entry = { kind, strlen(name), offset, size };
    uint64_t data_size = kind == 'W' ? size : 0, total = sizeof entry + entry.name_size + data_size;
    char *line = malloc(total);
    memcpy(line, &entry, sizeof entry);
    memcpy(line + sizeof entry, name, entry.name_size);
    if (data_size)
        memcpy(line + sizeof entry + entry.name_size, data, data_size);
    if (REAL(write)(journal, line, total) != (ssize_t)total)
        abort();
    free(line);
}

static ssize_t put(int fd, const void *data, size_t size, off64_t offset)
{
    char buffer[4096];
    const char *name = watched(fd, buffer, sizeof buffer);
    if (!name)
        return offset < 0 ? REAL(write)(fd, data, size) : REAL(pwrite64)(fd, data, size, offset);
    if (faults->write_errno) {
        errno = faults->write_errno;
        return -1;
    }
    pthread_mutex_lock(&order);
    uint64_t at = offset < 0 ? (uint64_t)lseek64(fd, 0, SEEK_CUR) : (uint64_t)offset;
    ssize_t done = offset < 0 ? REAL(write)(fd, data, size) : REAL(pwrite64)(fd, data, size, offset);
    if (done > 0)
        record('W', name, at, data, done);
    pthread_mutex_unlock(&order);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) { return put(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return put(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return put(fd, data, size, offset); }

static int cut_to(int fd, off64_t size)
{
    char buffer[4096];
    const char *name = watched(fd, buffer, sizeof buffer);
    pthread_mutex_lock(&order);
    int failed = REAL(ftruncate64)(fd, size);
    if (name && !failed)
        record('T', name, size, NULL, 0);
    pthread_mutex_unlock(&order);
    return failed;
}

int ftruncate(int fd, off_t size) { return cut_to(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut_to(fd, size); }

/* A sync is an entry and nothing else: what the power cut leaves is made from the journal. */
static int sync_file(int fd)
{
    char buffer[4096];
    const char *name = watched(fd, buffer, sizeof buffer);
    if (name && faults->sync_errno) {
        errno = faults->sync_errno;
        return -1;
    }
    if (name) {
        pthread_mutex_lock(&order);
        record('S', name, 0, NULL, 0);
        pthread_mutex_unlock(&order);
    }
    return 0;
}

int fsync(int fd) { return sync_file(fd); }
int fdatasync(int fd) { return sync_file(fd); }
