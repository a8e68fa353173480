BEGIN TRANSACTION;
CREATE TABLE active_student (
	id INTEGER NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(name) REFERENCES students (name)
);
INSERT INTO "active_student" VALUES(1,'tiny');
CREATE TABLE requests (
	request_id VARCHAR(128) NOT NULL, 
	body_sha256 VARCHAR(64) NOT NULL, 
	answer BLOB NOT NULL, 
	PRIMARY KEY (request_id)
);
INSERT INTO "requests" VALUES('q1','3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d',X'616E73776572');
CREATE TABLE student_versions (
	name VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	source VARCHAR NOT NULL, 
	"commit" VARCHAR NOT NULL, 
	evaluation_id VARCHAR NOT NULL, 
	create_time DATETIME NOT NULL, 
	PRIMARY KEY (name, version), 
	FOREIGN KEY(name) REFERENCES students (name)
);
INSERT INTO "student_versions" VALUES('tiny',1,'x','x','','2026-11-21 21:07:04.767367');
CREATE TABLE students (
	name VARCHAR(64) NOT NULL, 
	architecture VARCHAR NOT NULL, 
	parameters INTEGER NOT NULL, 
	context_tokens INTEGER NOT NULL, 
	current_version INTEGER NOT NULL, 
	create_time DATETIME NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "students" VALUES('tiny','x',7,7,1,'2026-11-21 21:07:04.767367');
COMMIT;
